"""Generation through the cut model: the same tokens as plain transformers, and only new tokens' hidden states cross."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig
from hpc.data.dataset import load_client_data
from hpc.errors import ConfigError, LinkError, PeerLost
from hpc.link.channel import Channel
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.model.build import ModelBuilder
from hpc.model.continued import ContinuedLM, WholeChain
from hpc.model.pretrained import load_tokenizer
from hpc.report.events import read_events, role_path
from hpc.served_decoding import MAX_CHAINS
from tests.loopback import Outcome, run_centralised, run_split
from tests.plain import plain_model, put_values
from tests.serving import CONTEXT, CPU, Serving, serving

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "nucleus": {"do_sample": True, "top_p": 0.7, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "do_sample": False, "length_penalty": 0.5},
    "beams that draw": {"num_beams": 2, "do_sample": True},
    "penalty": {"do_sample": False, "repetition_penalty": 1.8, "min_new_tokens": 5},
}


def tiny(**adapter: Any) -> Config:
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"), train=TrainConfig(clients=2), adapter=AdapterConfig(**adapter)
    )


@pytest.fixture(scope="module")
def two() -> Iterator[Serving]:
    yield from serving(tiny(), 2)


def prompts(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded rows of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + 256 * (1 - mask), "attention_mask": mask}


def both(two: Any, given: dict[str, torch.Tensor], client: int = 0, **ways: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for model in (two.models[client], two.plain):
        set_seed(3)
        found.append(model.generate(**given, max_new_tokens=12, pad_token_id=256, **ways))
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(7,), (9, 3, 5)], ids=["one", "several"])
def test_the_tokens_are_the_uncut_models(two: Serving, way: str, lengths: tuple[int, ...]) -> None:
    split, plain = both(two, prompts(*lengths), **WAYS[way])
    assert torch.equal(split, plain)


def test_a_stopping_criterion_stops_both_alike(two: Serving) -> None:
    given = prompts(6)
    free = two.plain.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=256)
    third = int(free[0, 6 + 3])
    split, plain = both(two, given, do_sample=False, eos_token_id=third)
    assert torch.equal(split, plain)
    assert len(split[0]) < len(free[0])


def test_an_uncut_part_generates_the_same() -> None:
    builder = ModelBuilder.of(tiny())
    part, folder = builder.part("whole").eval(), builder.resolver.name_or_path
    model = ContinuedLM(builder.hf_config, lambda rows: WholeChain(part, rows), device=CPU, folder=folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for way in ("greedy", "beams"):
        kwargs = {"max_new_tokens": 8, "pad_token_id": 256, **WAYS[way]}
        given = prompts(4, 8)
        assert torch.equal(model.generate(**given, **kwargs), plain.generate(**given, **kwargs))


def test_only_the_new_tokens_hidden_state_crosses(two: Serving) -> None:
    channel, hidden = two.channels[0], 64
    spent = []
    for new in (1, 11):
        before = channel.stats
        two.models[0].generate(**prompts(9, 4), max_new_tokens=new, min_new_tokens=new, pad_token_id=256)
        spent.append(before.until(channel.stats))
    first, rest = spent[0], spent[1]
    assert first.payload_bytes_sent == (9 + 4) * hidden * 4
    assert rest.payload_bytes_sent - first.payload_bytes_sent == 10 * 2 * hidden * 4
    assert rest.payload_bytes_received == rest.payload_bytes_sent


def test_several_clients_ask_at_once(two: Serving) -> None:
    found: dict[int, torch.Tensor] = {}

    def ask(client: int) -> None:
        given = prompts(5, 8, seed=client)
        found[client] = two.models[client].generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=256)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for client in range(2):
        plain = two.plain.generate(**prompts(5, 8, seed=client), max_new_tokens=20, do_sample=False, pad_token_id=256)
        assert torch.equal(found[client], plain)


def test_a_trained_adapter_is_heard(tmp_path: Any) -> None:
    """LoRA in all three parts: what PEFT's model generates."""
    config = tiny(lora_r=4, lora_alpha=8)

    def perturb(part: Any) -> None:
        with torch.no_grad():
            for name, parameter in part.trainable().items():
                parameter.copy_(values(name, parameter.shape))

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        seed = sum(map(ord, name))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2

    for served in serving(config, 1, prepare=perturb):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft = get_peft_model(served.plain, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(values(name.removeprefix("base_model."), parameter.shape))
        given = prompts(9, 3)
        theirs = peft.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=256)
        ours = served.models[0].generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=256)
        assert torch.equal(ours, theirs)


def test_a_prefix_is_in_every_parts_cache() -> None:
    """Cached generation equals choosing the likeliest token of the whole text's logits, again and again."""
    config = tiny(method="p_tuning_v2", num_virtual_tokens=5)
    for served in serving(config, 1):
        builder = ModelBuilder.of(config)
        whole = builder.part("whole").eval()
        ids = prompts(7)["input_ids"]
        for _ in range(10):
            with torch.no_grad():
                ids = torch.cat([ids, whole(ids)[:, -1].argmax(-1)[:, None]], 1)
        ours = served.models[0].generate(prompts(7)["input_ids"], max_new_tokens=10, min_new_tokens=10, do_sample=False)
        padded = served.models[0].generate(**prompts(7, 9), max_new_tokens=10, min_new_tokens=10, do_sample=False)
        assert torch.equal(ours, ids)
        short = padded[0, 2:]
        alone = served.models[0].generate(short[None, :7], max_new_tokens=10, min_new_tokens=10, do_sample=False)
        assert torch.equal(alone[0], short)


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        (prompts(2049), {}, r"2049 tokens; the model's context of 2048 leaves no room"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
            {},
            "padding_side = 'left'",
        ),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, {"use_cache": False}, "use_cache=False"),
        (
            {"input_ids": torch.ones(2, 2, dtype=torch.long), "attention_mask": torch.tensor([[0, 0], [1, 1]])},
            {},
            "prompt 0 has no tokens",
        ),
        (prompts(*[2] * 100), {"num_beams": 2}, "200 rows .* at most 192"),
    ],
    ids=["too long", "right padding", "no cache", "empty", "too many rows"],
)
def test_what_cannot_be_continued_is_refused(
    two: Serving, given: dict[str, torch.Tensor], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        two.models[0].generate(**given, max_new_tokens=2, pad_token_id=256, **kwargs)
    split, plain = both(two, prompts(3), do_sample=False)  # and nothing is broken by it
    assert torch.equal(split, plain)


def hidden(tokens: int, size: int = 64) -> torch.Tensor:
    return torch.zeros(tokens, size)


BAD: dict[str, Callable[[Channel], None]] = {
    "another hidden size": lambda c: c.send(Header(kind=Kind.DECODE, lengths=(3,)), hidden(3, 32)),
    "another dtype": lambda c: c.send(Header(kind=Kind.DECODE, lengths=(3,)), hidden(3).half()),
    "fewer rows than told": lambda c: c.send(Header(kind=Kind.DECODE, lengths=(3, 2)), hidden(3)),
    "an empty row": lambda c: c.send(Header(kind=Kind.DECODE, lengths=(3, 0)), hidden(3)),
    "past the context": lambda c: c.send(Header(kind=Kind.DECODE, lengths=(CONTEXT + 1,)), hidden(CONTEXT + 1)),
    "rows that it has not": lambda c: c.send(Header(kind=Kind.REORDER), torch.zeros(2, dtype=torch.int64)),
    "training": lambda c: c.send(Header(kind=Kind.SMASHED, lengths=(3,)), hidden(3)),
}


def begin(channel: Channel, chain: int = 0) -> None:
    channel.send(Header(kind=Kind.DECODE, micro=chain, lengths=(2, 2)), hidden(4))
    channel.recv(Kind.DECODED)


def more_rows(channel: Channel) -> None:
    begin(channel)
    channel.send(Header(kind=Kind.DECODE, lengths=(1, 1, 1)), hidden(3))


def ragged(channel: Channel) -> None:
    begin(channel)
    channel.send(Header(kind=Kind.DECODE, lengths=(1, 2)), hidden(3))


def foreign_rows(channel: Channel) -> None:
    begin(channel)
    channel.send(Header(kind=Kind.REORDER), torch.tensor([0, 2]))


def chains_without_end(channel: Channel) -> None:
    for chain in range(MAX_CHAINS):
        begin(channel, chain)
    channel.send(Header(kind=Kind.DECODE, micro=MAX_CHAINS, lengths=(2, 2)), hidden(4))


BAD |= {"more rows": more_rows, "ragged": ragged, "foreign rows": foreign_rows, "too many": chains_without_end}


@pytest.mark.parametrize("bad", BAD)
def test_a_client_that_sends_what_cannot_be_is_told_and_harms_no_other(bad: str) -> None:
    for served in serving(tiny(), 2):
        BAD[bad](served.channels[0])
        with pytest.raises(LinkError, match="client"):
            served.channels[0].recv(Kind.DECODED)
        split, plain = both(served, prompts(5), client=1, do_sample=False)
        assert torch.equal(split, plain)


def test_a_client_that_is_gone_harms_no_other() -> None:
    for served in serving(tiny(), 2):
        begin(served.channels[0])
        served.channels[0].close()
        split, plain = both(served, prompts(5), client=1, do_sample=False)
        assert torch.equal(split, plain)


def test_finished_rows_are_forgotten(two: Serving) -> None:
    """More batches one after the other than may be there at a time."""
    for _ in range(MAX_CHAINS + 2):
        split, plain = both(two, prompts(3), do_sample=False)
        assert torch.equal(split, plain)


def answers(config: Config, client: int, step_by_step: Any) -> int:
    """Examples that a plain model answers right, one token after the other, one example at a time."""
    builder = ModelBuilder.of(config)
    data = load_client_data(config, client, load_tokenizer(builder.resolver))
    matched = 0
    for item in data.val_items:
        ids, gold = list(item.prompt), item.choices[item.gold]
        for _ in gold:
            with torch.no_grad():
                ids.append(int(step_by_step(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        matched += ids[len(item.prompt) :] == gold
    return matched


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined", "replica", "centralised"])
def test_evaluation_decodes_through_the_split(tmp_path: Path, schedule: str) -> None:
    config = Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=4),
        data=DataConfig(train_examples=16, val_examples=6, evaluate_by="generation"),
        train=TrainConfig(
            schedule=schedule,  # type: ignore[arg-type]
            clients=2,
            max_steps=12,
            per_client_batch_size=4,
            learning_rate=3e-2,
            sync_every=6 if schedule == "replica" else 1,
            eval_batch_size=4,
        ),
    )
    outcome = (run_centralised if schedule == "centralised" else run_split)(config, tmp_path)
    roles = ["centralised"] if schedule == "centralised" else ["client-0", "client-1"]
    found = [e for role in roles for e in read_events(role_path(tmp_path, role)) if e["event"] == "eval"]
    plain = plain_model(config, ModelBuilder.of(config)).eval()
    assert [e["matched"] for e in found if e["step"] == 0] == [answers(config, client, plain) for client in range(2)]
    after = []
    for client in range(2):
        put_values(config, plain, values_of(client, outcome))
        after.append(answers(config, client, plain))
    assert [e["matched"] for e in found if e["step"] > 0] == after
    assert schedule == "replica" or sum(after), "it learns to answer"


def values_of(client: int, outcome: Outcome) -> dict[str, torch.Tensor]:
    """What learned for this client, by the project's names."""
    replica = f"replica-{client}/"
    own = {
        name: p.detach() for each in outcome.clients[client : client + 1] for name, p in each.learner.parameters.items()
    }
    trunk = {
        n.removeprefix(replica): v for n, v in outcome.trained.items() if not n.startswith("replica-") or replica in n
    }
    return {**trunk, **own}


def test_one_who_asks_often_does_not_starve_one_who_has_finished() -> None:
    """The finished client waits longer than its deadline, and hears that it goes on."""
    for served in serving(tiny(), 2, timeout_s=1.5):
        served.chains[1].enough()
        done = threading.Event()

        def ask(served: Serving = served, done: threading.Event = done) -> None:
            end = time.monotonic() + 4
            while time.monotonic() < end:
                served.models[0].generate(**prompts(3), max_new_tokens=4, pad_token_id=256)
            done.set()
            served.chains[0].enough()

        threading.Thread(target=ask, daemon=True).start()
        with pytest.raises(PeerLost):  # as nobody says goodbye here
            served.channels[1].recv(Kind.BYE)
        assert done.is_set()


def test_a_models_own_defaults_cannot_switch_the_cache_off(two: Serving) -> None:
    model = two.models[0]
    model.generation_config.use_cache = model.config.use_cache = False
    split, plain = both(two, prompts(4, 6), do_sample=False)
    assert torch.equal(split, plain)


def test_more_keys_and_values_than_agreed_are_refused() -> None:
    for served in serving(tiny(), 1, limit_bytes=30 * 512):  # 2 blocks x (16 keys + 16 values) x 2 heads x 4 bytes
        begin(served.channels[0])
        served.channels[0].send(Header(kind=Kind.DECODE, micro=1, lengths=(14, 13)), hidden(27))
        with pytest.raises(LinkError, match=r"32 tokens; --trunk.generation_gib leaves room for 30"):
            served.channels[0].recv(Kind.DECODED)


def test_tokens_beyond_the_context_are_refused_before_any_is_made(two: Serving) -> None:
    with pytest.raises(ConfigError, match=r"2040 tokens; 20 new ones exceed .* 2048: ask for at most 9"):
        two.models[0].generate(**prompts(2040), max_new_tokens=20, pad_token_id=256)
