"""What attacks are tried on: small public models, rows of tokens, and what their heads make of these."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc.config import AdapterConfig, Config, ModelConfig
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.seen import Seen
from tests.families import make_model


def public_model(family: str, head_blocks: int, folder: Path, dtype: str = "float32") -> PublicModel:
    """`tiny-llama`, or one of `tests.families`, written to `folder` first."""
    name = family
    if family != "tiny-llama":
        name = str(folder / family)
        make_model(family).save_pretrained(name)
    model = ModelConfig(name_or_path=name, head_blocks=head_blocks, dtype=dtype)  # type: ignore[arg-type]
    return PublicModel.of(Config(model=model, adapter=AdapterConfig(lora_r=2)))


def draw_rows(vocabulary: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def seen_from(rows: list[list[int]], hidden: list[torch.Tensor]) -> list[Seen]:
    """One batch of all rows but the last, and one of the last."""
    groups = [slice(0, len(rows) - 1), slice(len(rows) - 1, len(rows))]
    return [
        Seen(
            client_id=0,
            step=step,
            lengths=tuple(len(row) for row in rows[group]),
            smashed_SD=torch.cat(hidden[group]).float(),
        )
        for step, group in enumerate(groups)
    ]


@torch.no_grad()
def plain_hidden(family: str, folder: Path, rows: list[list[int]], block: int) -> list[torch.Tensor]:
    """What transformers' own uncut model has in front of `block`, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / family).eval()
    return [model(torch.tensor([row]), output_hidden_states=True).hidden_states[block][0] for row in rows]
