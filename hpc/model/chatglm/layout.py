"""Where the tokens of a row stand: what ChatGLM's positions and attention depend on besides the hidden states.

A row is `context … [MASK] or [gMASK] … <sop> target …`. Two integers describe it, its **row layout**:

    row_layout_B2[b] = (place of the mask token, context length = place of the first <sop>)

A token's place is its index in its own row: 0 for the first token, left padding and prefixes (p-tuning) not counted.
Layout and places give everything else, so a part of a cut model that never sees token ids needs only the layout (16
bytes a row, or 4: both are below `max_sequence_length`) beside the places, which follow from the row lengths. It
stays the same while a row is continued.

- Rotary position: the place in the context, the mask token's place for every target token.
- Rotary block position: 0 in the context; 1, 2, … in the target, which begins with <sop>.
- Attention: everything sees the whole context, and a target token also the target up to itself.

Shape suffixes: B rows, T tokens of this call, C columns of a mask, S key slots (cached, then T).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from hpc.errors import ModelError
from hpc.model.chatglm.configuration import ChatGLMConfig


def places_of(rows: int, tokens: int, attention_mask_BC: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """`place_BT` of rows that begin in this call; padding (mask 0) on either side takes a neighbour's place."""
    if attention_mask_BC is None:
        return torch.arange(tokens, device=device).expand(rows, tokens)
    return (attention_mask_BC[:, -tokens:].long().cumsum(1) - 1).clamp(min=0)


def row_layout_of(ids_BT: torch.Tensor, place_BT: torch.Tensor, config: ChatGLMConfig) -> torch.Tensor:
    """`row_layout_B2` (int64) of whole rows. Raises `ModelError` for a row without <sop>, or no mask token before it.

    The mask token is the first [gMASK], or the first [MASK] in rows without [gMASK]. The published code looks for it
    in the whole row; here before <sop>, so that a generated [gMASK] cannot move a row's positions.
    """
    bos_BT = ids_BT.eq(config.bos_token_id)
    in_context_BT = bos_BT.long().cumsum(1) == 0
    gmask_BT = ids_BT.eq(config.gmask_token_id) & in_context_BT
    mask_BT = ids_BT.eq(config.mask_token_id) & in_context_BT
    either_BT = torch.where(gmask_BT.any(1, keepdim=True), gmask_BT, mask_BT)
    if ids_BT.device.type != "meta":
        _refuse_unmarked(bos_BT, either_BT, config)
    index_B2 = torch.stack([either_BT.long().argmax(1), bos_BT.long().argmax(1)], 1)
    return place_BT.expand_as(ids_BT).gather(1, index_B2)


def _refuse_unmarked(bos_BT: torch.Tensor, mask_BT: torch.Tensor, config: ChatGLMConfig) -> None:
    whole_B = bos_BT.any(1) & mask_BT.any(1)
    if not bool(whole_B.all()):
        raise ModelError(
            f"row {int(whole_B.long().argmin())} has no [MASK] ({config.mask_token_id}) or [gMASK] "
            f"({config.gmask_token_id}) followed by <sop> ({config.bos_token_id}), which ChatGLM's positions depend "
            "on: end the prompt with [gMASK] <sop>, or give row_layout_B2"
        )


def positions_of(row_layout_B2: torch.Tensor, place_BT: torch.Tensor) -> torch.Tensor:
    """`position_B2T`: position and block position of every token."""
    mask_B1, context_B1 = row_layout_B2.split(1, dim=1)
    position_BT = torch.where(place_BT < context_B1, place_BT, mask_B1)
    block_BT = (place_BT - context_B1 + 1).clamp(min=0)
    return torch.stack([position_BT, block_BT], 1)


def allowed_of(
    row_layout_B2: torch.Tensor, place_BT: torch.Tensor, *, held: int, attention_mask_BC: torch.Tensor | None
) -> torch.Tensor | None:
    """`allowed_B1TS`: which of the `held` cached slots and the T tokens each token sees; None: all of them.

    What the cache holds (prefixes, then earlier tokens) is seen unless masked. `attention_mask_BC` is 0 at padding;
    it covers the last C key slots. Each token sees itself, so that padding never divides by zero.
    """
    tokens = place_BT.shape[1]
    if tokens == 1 and attention_mask_BC is None:
        return None
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=place_BT.device).tril()
    context_BT = place_BT < row_layout_B2[:, 1:]
    allowed_BTS = functional.pad(causal_TT | context_BT[:, None], (held, 0), value=True)
    if attention_mask_BC is not None:
        unseen = held + tokens - attention_mask_BC.shape[1]
        real_BS = functional.pad(attention_mask_BC.bool(), (unseen, 0), value=True)
        itself_TS = torch.eye(tokens, dtype=torch.bool, device=place_BT.device)
        allowed_BTS = (allowed_BTS & real_BS[:, None]) | functional.pad(itself_TS, (held, 0), value=False)
    return allowed_BTS[:, None]
