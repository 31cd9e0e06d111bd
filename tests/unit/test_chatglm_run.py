"""ChatGLM through the whole engine: its rows' layout travels, and the results are those of plain loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig
from hpc.data.dataset import load_client_data
from hpc.errors import LinkError
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.attacks.nearest_embedding import nearest_embedding
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.seen import Seen
from hpc.report.events import read_events, role_path
from tests.loopback import run_centralised, run_split
from tests.plain import plain_losses
from tests.serving import serving
from tests.unit.chatglm_folder import write_chatglm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatglm(tmp_path_factory.mktemp("chatglm"))


def config_of(folder: Path, method: str = "lora", **train: Any) -> Config:
    return Config(
        model=ModelConfig(name_or_path=str(folder)),
        adapter=AdapterConfig(method=method, lora_r=4, num_virtual_tokens=4),  # type: ignore[arg-type]
        data=DataConfig(train_examples=12, val_examples=4, max_source_length=400, evaluate_by="generation"),
        train=TrainConfig(**{"clients": 2, "max_steps": 6, "per_client_batch_size": 3, "learning_rate": 1e-2, **train}),
    )


@pytest.mark.parametrize("method", ["lora", "p_tuning_v2"])
@pytest.mark.parametrize("schedule", ["client_batch", "pipelined"])
def test_losses_are_a_plain_loops(folder: Path, tmp_path: Path, method: str, schedule: str) -> None:
    config = config_of(folder, method, schedule=schedule)
    plain = plain_losses(config, [(0, 1)] * 6)
    assert run_split(config, tmp_path).losses == pytest.approx(plain, rel=2e-5)


def test_serial_is_the_uncut_model_to_the_bit(folder: Path, tmp_path: Path) -> None:
    serial = run_split(config_of(folder, schedule="serial", clients=1), tmp_path / "split")
    whole = run_centralised(config_of(folder, schedule="centralised", clients=1), tmp_path / "whole")
    assert serial.losses == whole.losses
    assert all(torch.equal(serial.trained[name], value) for name, value in whole.trained.items())


def test_a_replica_of_a_client_alone_is_the_shared_trunk(folder: Path, tmp_path: Path) -> None:
    replica = run_split(config_of(folder, schedule="replica", clients=1, sync_every=2), tmp_path / "replica")
    shared = run_split(config_of(folder, clients=1), tmp_path / "shared")
    assert replica.losses == pytest.approx(shared.losses, rel=1e-5)


def test_answers_are_decoded_as_the_uncut_model_does(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, max_steps=1)
    run_split(config, tmp_path)
    found = [read_events(role_path(tmp_path, f"client-{client}")) for client in range(2)]
    matched = [next(e["matched"] for e in events if e["event"] == "eval") for events in found]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(ModelBuilder.of(config).resolver)
    for client, count in enumerate(matched):
        right = 0
        for item in load_client_data(config, client, tokenizer).val_items:
            gold = item.choices[item.gold]
            assert item.prompt[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
            given = torch.tensor([item.prompt])
            out = model.generate(given, max_new_tokens=len(gold), do_sample=False, eos_token_id=-1, pad_token_id=3)
            right += out[0, len(item.prompt) :].tolist() == gold
        assert count == right


def test_generation_is_the_uncut_models(folder: Path) -> None:
    """Prompts of different lengths and mask places, with beams and without; the layout is told once."""
    config = config_of(folder)
    for served in serving(config, 1):
        special = served.plain.config
        rows = [[9, 20, 31, 12, special.gmask_token_id, special.bos_token_id]]
        rows.append([40, special.mask_token_id, 21, special.bos_token_id])
        width = max(map(len, rows))
        ids_BT = torch.tensor([[3] * (width - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        for ways in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            given = {"attention_mask": mask_BT, "max_new_tokens": 12, "pad_token_id": 3, **ways}
            assert torch.equal(served.models[0].generate(ids_BT, **given), served.plain.generate(ids_BT, **given))


def test_the_nearest_public_embedding_reads_a_client_without_blocks(folder: Path) -> None:
    config = config_of(folder)
    config = replace(config, model=replace(config.model, head_blocks=0))
    public = PublicModel.of(config)
    ids = [9, 20, 31, 12, 5, 6, 40]  # [gMASK] <sop>
    embeddings_VD = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    seen = Seen(client_id=0, step=0, lengths=(len(ids),), smashed_SD=embeddings_VD[ids].float())
    assert nearest_embedding([seen], public) == [[ids]]


@pytest.mark.parametrize("layout", [(), (1, 3), (2, 1)], ids=["none", "beyond the row", "mask after the context"])
def test_a_row_without_a_sound_layout_is_refused(folder: Path, layout: tuple[int, ...]) -> None:
    for served in serving(config_of(folder), 1):
        served.channels[0].send(Header(kind=Kind.DECODE, lengths=(3,), layout=layout), torch.zeros(3, 48))
        with pytest.raises(LinkError, match="layout"):
            served.channels[0].recv(Kind.DECODED)
