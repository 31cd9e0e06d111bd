"""Attack (g): who has only the sealed messages takes their bytes for activations, and looks for the nearest embeddings.

Nothing better is known against AES-256-GCM, so this stays at the floor. It is not blind by construction: where a run
had --link.encryption off, the same bytes are the activations, and it reads them as `nearest_embedding` does.

Shape suffixes: S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hpc.config import Config
from hpc.link.cipher import TAG_BYTES
from hpc.link.frame import BODY_BYTES, PREFIX_BYTES
from hpc.privacy.attacks.nearest_embedding import nearest_embedding
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.recorded import Sealed
from hpc.privacy.seen import Seen


def sealed_frames(seen: Sequence[Seen], sealed: Sequence[Sealed], public: PublicModel) -> list[list[list[int]]]:
    """Guesses for each batch and row. Of `seen` only the lengths are used, which are more than a peer is told.

    A batch without messages (they are kept up to a limit) gets those of another. Raises as `nearest_embedding` does.
    """
    fakes = []
    for index, batch in enumerate(seen):
        messages = sealed[index % len(sealed)].messages
        smashed_SD = as_activations(messages, public.config, tokens=sum(batch.lengths), size=batch.smashed_SD.shape[1])
        fakes.append(replace(batch, smashed_SD=smashed_SD, grad_trunk_out_SD=None))
    return nearest_embedding(fakes, public)


def as_activations(messages: Sequence[torch.Tensor], config: Config, *, tokens: int, size: int) -> torch.Tensor:
    """`_SD`, float32: the messages' bytes behind what is known to be header and tags; repeated if they are too few."""
    tag = 0 if config.link.encryption == "off" else TAG_BYTES
    first, *others = messages
    inline = first[PREFIX_BYTES + BODY_BYTES + tag :]
    pieces = [piece[: len(piece) - tag] for piece in (inline, *others) if len(piece) > tag]
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    raw = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8)
    whole = raw[: len(raw) - len(raw) % (size * dtype.itemsize)].clone()
    rows_SD = whole.view(dtype).float().reshape(-1, size) if len(whole) else torch.zeros(1, size)
    rows_SD = rows_SD.nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4)
    return rows_SD.repeat(-(-tokens // len(rows_SD)), 1)[:tokens]
