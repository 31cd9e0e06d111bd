"""Noise on what leaves a client: as configured, fresh each time, on every way out, and exact in training."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc import generate
from hpc.config import AdapterConfig, Config, DataConfig, LinkConfig, ModelConfig, PrivacyConfig, RunConfig, TrainConfig
from hpc.data.dataset import ClientData
from hpc.errors import NonFinite, PeerLost
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.model.build import ModelBuilder
from hpc.privacy.defences.ledger import Ledger
from hpc.privacy.defences.noise import FreshNoise, clip_rows, equal_norms, released
from hpc.privacy.defences.prepare import ledger_path
from hpc.privacy.defences.shield import Shield
from hpc.report.events import read_events, role_path
from hpc.topology import Place, read_world
from tests import plain
from tests.loopback import Outcome, run_split
from tests.unit.test_wire import Tap, found

CLIP, SIGMA, GRADIENT_CLIP = 2.0, 0.5, 0.01
SURE = 6  # standard errors: a sound generator fails once in a billion runs
OUT = (Kind.SMASHED, Kind.EVAL_SMASHED, Kind.DECODE, Kind.GRAD_TRUNK_OUT)
ROWS_TD = torch.randn(2000, 50, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 2, 2000)[:, None]


def moments(noise: torch.Tensor, std: float) -> None:
    """Mean, standard deviation, fourth moment and correlation of neighbours as of independent normal values."""
    values, n = noise.double().flatten() / std, noise.numel()
    assert abs(values.mean()) < SURE / math.sqrt(n)
    assert abs(values.square().mean() - 1) < SURE * math.sqrt(2 / n)
    assert abs(values.pow(4).mean() - 3) < SURE * math.sqrt(96 / n)
    assert abs((values[1:] * values[:-1]).mean()) < SURE / math.sqrt(n)


def test_rows_are_clipped_to_the_norm_and_short_ones_left_alone() -> None:
    norms_T = ROWS_TD.norm(dim=-1)
    kept_TD = clip_rows(ROWS_TD, CLIP)
    assert 500 < int((norms_T > CLIP).sum()) < 1900
    assert torch.equal(kept_TD[norms_T < CLIP], ROWS_TD[norms_T < CLIP])
    assert kept_TD.norm(dim=-1).max() <= CLIP * (1 + 1e-6)
    torch.testing.assert_close(kept_TD, ROWS_TD * (CLIP / norms_T).clamp(max=1)[:, None])


def test_the_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    shield = Shield(PrivacyConfig(clip_norm=CLIP, noise_multiplier=SIGMA))
    moments(shield.smashed(ROWS_TD) - clip_rows(ROWS_TD, CLIP), SIGMA * CLIP)


def test_fedseas_noise_has_its_standard_deviation_and_no_clipping() -> None:
    shield = Shield(PrivacyConfig(noise_scale=0.3))
    moments(shield.smashed(ROWS_TD) - ROWS_TD, 0.3 * math.sqrt(math.pi / 2))


def test_the_gradient_is_clipped_without_its_loss_scale() -> None:
    shield = Shield(PrivacyConfig(gradient_clip_norm=CLIP, gradient_noise_multiplier=SIGMA))
    for scale in (1.0, 2.0**16, 1e-30):
        sent_TD = shield.gradient(ROWS_TD[None] * scale, [2000], loss_scale=scale)[0]
        moments(sent_TD / scale - clip_rows(ROWS_TD, CLIP), SIGMA * CLIP)


def test_noise_is_rounded_to_the_precision_of_the_wire_at_last() -> None:
    shield = Shield(PrivacyConfig(clip_norm=CLIP, noise_multiplier=SIGMA))
    sent_TD = shield.smashed(ROWS_TD.bfloat16())
    assert sent_TD.dtype is torch.bfloat16
    moments(sent_TD.float() - clip_rows(ROWS_TD.bfloat16(), CLIP), SIGMA * CLIP)


def test_what_is_not_finite_is_hidden_like_everything_else() -> None:
    """By rows of zeros under the noise, whatever scale the server chooses; a pattern of such values says a lot."""
    shield = Shield(PrivacyConfig(clip_norm=CLIP, gradient_clip_norm=CLIP, gradient_noise_multiplier=SIGMA))
    for bad in (math.nan, math.inf, -math.inf):
        rows_TD = ROWS_TD.clone()
        rows_TD[7, 3] = bad
        kept_TD = shield.smashed(rows_TD)
        assert torch.equal(kept_TD[7], torch.zeros(50))
        assert torch.equal(kept_TD[8:], clip_rows(ROWS_TD, CLIP)[8:])
        assert shield.gradient(rows_TD[None], [2000], loss_scale=1.0).isfinite().all()
    assert shield.gradient(ROWS_TD[None], [2000], loss_scale=1e-45).isfinite().all()
    assert not shield.keeps_all_of(rows_TD, CLIP)
    assert shield.keeps_all_of(rows_TD, 0)
    assert shield.keeps_all_of(ROWS_TD, CLIP)


def test_without_a_defence_everything_goes_through_untouched() -> None:
    shield = Shield(PrivacyConfig())
    assert shield.smashed(ROWS_TD) is ROWS_TD
    assert shield.gradient(ROWS_TD, [2000], loss_scale=3.0) is ROWS_TD


def test_each_release_is_fresh_whatever_torch_was_seeded_with() -> None:
    source, other = FreshNoise(), FreshNoise()
    drawn = []
    for each in (source, source, other):
        torch.manual_seed(0)
        drawn.append(released(ROWS_TD, each, clip_norm=CLIP, std=1.0))
    assert all(not bool((a == b).all(1).any()) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2])))


def drawn_after_seed_0() -> bytes:
    torch.manual_seed(0)
    return FreshNoise().like(torch.zeros(8)).numpy().tobytes()


def test_two_processes_with_the_same_seed_draw_other_noise() -> None:
    """A fork, which has all that this process has."""
    mine, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os.write(theirs, drawn_after_seed_0())
        os._exit(0)
    os.close(theirs)
    with open(mine, "rb") as pipe:
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert len(told) == 32
    assert told != drawn_after_seed_0()


@pytest.mark.parametrize("loss_scale", [1.0, 3e38, 0.0, math.inf, math.nan])
def test_what_overflows_is_not_told_by_what_leaves(loss_scale: float) -> None:
    """A server that chooses the loss scale could else read, value by value and without noise, which are large."""
    shield = Shield(PrivacyConfig(gradient_clip_norm=GRADIENT_CLIP, gradient_noise_multiplier=SIGMA))
    sent_BTD = shield.gradient(ROWS_TD[None, -4:] * loss_scale, [4], loss_scale=loss_scale)
    assert bool(sent_BTD.isfinite().all()) is (loss_scale < math.inf)
    assert sent_BTD.isfinite().any() == sent_BTD.isfinite().all(), "alike for all values"


def test_a_row_that_is_not_finite_becomes_zeros() -> None:
    rows_TD = torch.tensor([[1.0, math.inf, 0.0], [math.nan, 2.0, 2.0], [1e30, 0.0, 0.0]])
    assert torch.equal(clip_rows(rows_TD, CLIP), torch.zeros(3, 3))


def test_a_row_of_zeros_has_a_gradient_through_the_clipping() -> None:
    rows_TD = torch.zeros(2, 3, requires_grad=True)
    clip_rows(rows_TD, 1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert rows_TD.grad is not None
    assert torch.equal(rows_TD.grad, torch.ones(2, 3))


def test_label_protection_makes_all_rows_equally_long_and_keeps_their_mean() -> None:
    """Li et al., 2021: norms of 0.1 and of 1 (the greatest), and rows without any gradient."""
    draws, source = 20000, FreshNoise()
    grad_BTD = torch.zeros(1, 3 * draws, 8)
    grad_BTD[0, :draws, 0], grad_BTD[0, draws : 2 * draws, 1] = 0.1, 1.0
    beyond_BTD = torch.cat([grad_BTD, torch.full((1, 1, 8), 9.0)], 1)  # padding has no say in the greatest norm
    sent_BTD = equal_norms(beyond_BTD, source, (3 * draws,))[:, : 3 * draws]
    short_TD, longest_TD, empty_TD = sent_BTD[0].split(draws)
    assert torch.equal(longest_TD, grad_BTD[0, draws : 2 * draws])
    for rows_TD, mean_D in ((short_TD, grad_BTD[0, 0]), (empty_TD, torch.zeros(8))):
        # The square of a normal value has variance 2, and a row's squared norm is at most that uncertain.
        assert abs(rows_TD.square().sum(-1).mean() - 1) < SURE * math.sqrt(2 / draws)
        assert (rows_TD.mean(0) - mean_D).abs().max() < SURE / math.sqrt(draws)


@dataclass
class Recorded:
    """Every frame of one client as its channel got it, and all bytes on the wire."""

    config: Config
    folder: Path
    frames: list[tuple[Header, torch.Tensor | None]] = field(default_factory=list)
    noise: list[torch.Tensor] = field(default_factory=list)
    wire: bytes = b""
    outcome: Outcome | None = None

    @property
    def data(self) -> ClientData:
        assert self.outcome is not None
        return self.outcome.clients[0].data

    def of(self, kind: Kind) -> list[tuple[Header, torch.Tensor]]:
        return [(header, tensor) for header, tensor in self.frames if header.kind is kind and tensor is not None]


def record(config: Config, folder: Path) -> Recorded:
    recorded, wire = Recorded(config, folder), list[bytes]()

    def prepare(client: Any) -> None:
        send, like = client.channel.send, client.shield._source.like

        def sending(header: Header, tensor: torch.Tensor | None = None) -> None:
            recorded.frames.append((header, None if tensor is None else tensor.clone()))
            send(header, tensor)

        def drawing(values: torch.Tensor) -> torch.Tensor:
            recorded.noise.append(like(values))
            return recorded.noise[-1]

        client.channel.send, client.shield._source.like = sending, drawing

    recorded.outcome = run_split(config, folder, wrap=lambda transport: Tap(transport, wire), prepare=prepare)
    recorded.wire = b"".join(wire)
    return recorded


def tiny(**changes: Any) -> Config:
    privacy = PrivacyConfig(
        clip_norm=CLIP, noise_multiplier=SIGMA, gradient_clip_norm=GRADIENT_CLIP, gradient_noise_multiplier=SIGMA
    )
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=4, parts=["trunk", "tail"]),
        data=DataConfig(train_examples=12, val_examples=4, evaluate_by="generation"),
        train=TrainConfig(clients=1, max_steps=2, per_client_batch_size=3, seed=3),
        link=LinkConfig(encryption="off"),
        privacy=replace(privacy, **changes),
    )


@pytest.fixture(scope="module")
def noised(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Training, evaluation and decoding; the head is frozen, so that what it computes is known throughout."""
    return record(tiny(), tmp_path_factory.mktemp("noised"))


@pytest.fixture(scope="module")
def head(noised: Recorded) -> Any:
    fresh, _ = ModelBuilder.of(noised.config).client_parts()
    return torch.no_grad()(fresh.eval())


def exact_rows(head: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([head(torch.tensor([ids]))[0] for ids in rows])


def sent_in_training(noised: Recorded) -> Iterator[tuple[list[list[int]], torch.Tensor]]:
    for number, (_, sent_SD) in enumerate(noised.of(Kind.SMASHED)):
        yield [noised.data.train_rows[row].ids for row in noised.data.row_numbers(number)], sent_SD


def test_in_training_the_wire_has_clipped_rows_with_noise(noised: Recorded, head: Any) -> None:
    steps = [sent_SD - clip_rows(exact_rows(head, rows), CLIP) for rows, sent_SD in sent_in_training(noised)]
    assert len(steps) == 2
    moments(torch.cat(steps), SIGMA * CLIP)


def test_in_evaluation_the_wire_has_clipped_rows_with_fresh_noise(noised: Recorded, head: Any) -> None:
    rows = [item.prompt + choice for item in noised.data.val_items for choice in item.choices]
    exact_SD = clip_rows(exact_rows(head, rows), CLIP)
    first_SD, last_SD = (sent_SD - exact_SD for _, sent_SD in noised.of(Kind.EVAL_SMASHED))
    for noise_SD in (first_SD, last_SD):
        moments(noise_SD, SIGMA * CLIP)
    moments((first_SD - last_SD), math.sqrt(2) * SIGMA * CLIP)  # the two evaluations' noises are independent


def test_in_generation_the_wire_has_clipped_rows_with_noise(noised: Recorded, head: Any) -> None:
    header, sent_SD = noised.of(Kind.DECODE)[0]
    prompts = [item.prompt for item in noised.data.val_items]
    assert header.lengths == tuple(map(len, prompts))
    moments(sent_SD - clip_rows(exact_rows(head, prompts), CLIP), SIGMA * CLIP)


def test_no_row_leaves_without_noise_whatever_its_frame(noised: Recorded) -> None:
    """A clipped row is at most `norm` long; D values of noise make it about sigma * sqrt(D) = 4 times as long."""
    assert {header.kind for header, _ in noised.frames} >= set(OUT)
    for kind, norm in dict(zip(OUT, (CLIP, CLIP, CLIP, GRADIENT_CLIP), strict=True)).items():
        for _, sent_SD in noised.of(kind):
            assert sent_SD.norm(dim=-1).min() > 1.5 * norm, kind
            assert sent_SD.norm(dim=-1).max() < 7 * norm, kind


def test_the_bytes_on_the_wire_are_those_with_noise(noised: Recorded, head: Any) -> None:
    """The link is not sealed here, so its bytes can be searched."""
    rows, sent_SD = next(sent_in_training(noised))
    exact_SD, sent_SD = exact_rows(head, rows)[:8], sent_SD[:8]
    assert found(noised.wire, sent_SD.numpy().tobytes())
    for secret_SD in (exact_SD, clip_rows(exact_SD, CLIP)):
        assert not found(noised.wire, secret_SD.contiguous().numpy().tobytes())


def test_the_ledger_counts_what_was_on_the_wire(noised: Recorded) -> None:
    ledger = Ledger(ledger_path(noised.folder, 0))
    examples = len(noised.data.val_items)
    scored = sum(len(header.lengths) for header, _ in noised.of(Kind.EVAL_SMASHED))
    prompts = sum(len(header.lengths) for header, _ in noised.of(Kind.DECODE) if max(header.lengths) > 1)
    assert ledger.held_out * examples == scored + prompts > 0
    assert ledger.smashed == Counter(row for step in range(2) for row in noised.data.row_numbers(step))


def test_the_events_say_what_was_released(noised: Recorded) -> None:
    events = [e for e in read_events(role_path(noised.folder, "client-0")) if e["event"] == "privacy"]
    assert [event["releases"] for event in events] == [0, Ledger(ledger_path(noised.folder, 0)).held_out]
    assert events[-1]["epsilon"] == events[0]["epsilon_planned"] > events[0]["epsilon"] == 0


def test_training_is_exact_for_the_function_with_clipping_and_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain transformers and PEFT, whose autograd goes through the same clipping and noise between its blocks."""
    config = tiny()
    config = replace(
        config,
        adapter=AdapterConfig(lora_r=4),
        data=DataConfig(train_examples=12, val_examples=0),
        train=replace(config.train, max_steps=3, learning_rate=1e-2, adam_epsilon=0.01),
    )
    recorded = record(config, tmp_path)
    assert recorded.outcome is not None
    assert len(recorded.noise) == 6
    noise = iter(recorded.noise)

    def clipped(rows_BTD: torch.Tensor, norm: float) -> torch.Tensor:
        return rows_BTD * torch.clamp(norm / rows_BTD.norm(dim=-1, keepdim=True), max=1.0)

    def after_head(module: Any, args: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        return clipped(output_BTD, CLIP) + SIGMA * CLIP * next(noise)

    lengths = iter([header.lengths for header, _ in recorded.of(Kind.SMASHED)])

    def sent_back(grad_BTD: torch.Tensor) -> torch.Tensor:
        valid_BT = torch.arange(grad_BTD.shape[1])[None] < torch.tensor(next(lengths))[:, None]
        noised_BTD = clipped(grad_BTD, GRADIENT_CLIP) + SIGMA * GRADIENT_CLIP * next(noise)
        return noised_BTD.where(valid_BT[..., None], 0.0)  # padding is not sent, with or without noise

    def after_trunk(module: Any, args: Any, output_BTD: torch.Tensor) -> None:
        output_BTD.register_hook(sent_back)

    build = plain.plain_model

    def with_noise(*args: Any) -> Any:
        model = build(*args)
        blocks = model.base_model.model.model.layers
        blocks[0].register_forward_hook(after_head)
        blocks[2].register_forward_hook(after_trunk)
        return model

    monkeypatch.setattr(plain, "plain_model", with_noise)
    losses, trained = plain.plain_run(config, [[0]] * 3)
    assert recorded.outcome.losses == pytest.approx(losses, rel=1e-5)
    assert recorded.outcome.trained.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(recorded.outcome.trained[name], value, rtol=1e-4, atol=1e-6)


def test_the_trunk_hears_that_the_noise_hides_values_that_are_not_finite(tmp_path: Path) -> None:
    """It sees finite values only; nobody may step on rows that had to be left out."""

    def overflow(module: Any, args: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        return output_BTD.index_fill(1, torch.tensor([1]), math.inf)

    def prepare(client: Any) -> None:
        client.head.register_forward_hook(overflow)

    config = replace(tiny(), data=DataConfig(train_examples=12, val_examples=0))
    with pytest.raises(NonFinite, match="step 1: client 0: the loss is not finite; nobody stepped"):
        run_split(config, tmp_path, prepare=prepare)


class Wire:
    """A link of which only the sending end is there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sent: list[tuple[Header, torch.Tensor | None]] = []

    def send(self, header: Header, tensor: torch.Tensor | None = None) -> None:
        self.sent.append((header, tensor))

    def recv(self, *args: Any, **kwargs: Any) -> Any:
        raise PeerLost("nobody is there")

    def rest(self) -> None:
        pass

    def link(self, client: int) -> None:
        pass


def test_generation_by_itself_has_the_noise_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `launch/generate.py` sends, up to the trunk's first answer."""
    wire = Wire()
    for name, stand_in in {
        "Rendezvous": Wire,
        "prepare_process": lambda *args: None,
        "open_client_channel": lambda *args, **kwargs: (None, None),
        "closing_links": lambda channels: nullcontext(),
        "SteadyLink": lambda *args, **kwargs: wire,
    }.items():
        monkeypatch.setattr(generate, name, stand_in)
    config, ids = replace(tiny(), run=RunConfig(device="cpu")), list(range(5, 255))
    place = Place(role="client", index=0, world=read_world({}))
    with pytest.raises(PeerLost), generate.asking(config, place, None) as model:
        model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)
    header, sent_SD = wire.sent[0]
    head, _ = ModelBuilder.of(config).client_parts(adapted=False)
    assert header.kind is Kind.DECODE
    assert sent_SD is not None
    with torch.no_grad():
        moments(sent_SD - clip_rows(exact_rows(head.eval(), [ids]), CLIP), SIGMA * CLIP)
