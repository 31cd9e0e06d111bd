"""What a role trains besides the trunk: parameters in a fixed order, their gradients, and their optimiser.

The client's head and tail are one `Learner`; so is the uncut model of the baseline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from hpc.config import TrainConfig
from hpc.errors import ProtocolError
from hpc.model.part import LabelPositions, Part
from hpc.optim import make_adamw, scale_gradients, set_learning_rate, square_sum


class Learner:
    """The trainable parameters of one or two parts and AdamW over them. May be empty (everything frozen)."""

    def __init__(self, parts: Sequence[Part], train: TrainConfig) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        seen: set[int] = set()
        for part in parts:
            for name, parameter in part.trainable().items():
                if id(parameter) not in seen:  # tied weights are one parameter
                    seen.add(id(parameter))
                    self.parameters[name] = parameter
        self._optimiser = make_adamw(self.parameters.values(), train) if self.parameters else None

    @property
    def values(self) -> int:
        """Numbers that learn."""
        return sum(p.numel() for p in self.parameters.values())

    def square_sum(self) -> float:
        """Partial square sum of the global gradient norm."""
        return square_sum(p.grad for p in self.parameters.values())

    def flat_gradient(self) -> torch.Tensor:
        """All gradients as one float32 vector, in the fixed order; missing ones are 0."""
        flat = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in self.parameters.values()
        ]
        return torch.cat(flat) if flat else torch.empty(0)

    def set_flat_gradient(self, flat: torch.Tensor) -> None:
        """The inverse of `flat_gradient`."""
        for parameter, section in self._sections(flat):
            parameter.grad = section.view_as(parameter).to(parameter)

    def flat_values(self) -> torch.Tensor:
        """All parameters as one float32 vector, in the fixed order; a copy."""
        values = [p.detach().reshape(-1).float() for p in self.parameters.values()]
        return torch.cat(values) if values else torch.empty(0)

    @torch.no_grad()
    def set_flat_values(self, flat: torch.Tensor) -> None:
        """The inverse of `flat_values`."""
        for parameter, section in self._sections(flat):
            parameter.copy_(section.view_as(parameter))

    def _sections(self, flat: torch.Tensor) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        sizes = [p.numel() for p in self.parameters.values()]
        if flat.shape != (sum(sizes),):
            raise ProtocolError(f"the trunk sent {tuple(flat.shape)} for the {sum(sizes)} values that learn here")
        return zip(self.parameters.values(), flat.split(sizes), strict=True)

    def step(self, *, factor: float, rate: float) -> None:
        """One AdamW step with the gradients times `factor` (clipping and loss scale)."""
        if self._optimiser is not None:
            scale_gradients([p.grad for p in self.parameters.values()], factor)
            set_learning_rate(self._optimiser, rate)
            self._optimiser.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and optimiser state by name: all that another client needs to go on in this one's place."""
        state = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        if self._optimiser is not None:
            for name, parameter in self.parameters.items():
                for key, value in self._optimiser.state.get(parameter, {}).items():
                    state[f"{key}/{name}"] = value
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"parameter/{name}"])
            kept = {k: v for k, v in state.items() if k.endswith(f"/{name}") and not k.startswith("parameter/")}
            if self._optimiser is not None and kept:
                self._optimiser.state[parameter] = {
                    key.split("/", 1)[0]: value.clone() if value.dim() == 0 else value.to(parameter.device).clone()
                    for key, value in kept.items()
                }


def tail_loss_sum(
    tail: Part,
    inputs: torch.Tensor,
    labels: LabelPositions,
    label_ids_L: torch.Tensor,
    layout_B2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over the label tokens (nats), in float32; the LM head runs at label positions only."""
    logits_LV = tail(inputs, labels, layout_B2).float()
    return torch.nn.functional.cross_entropy(logits_LV, label_ids_L, reduction="sum")


def seed_dropout(seed: int, step: int, role: str) -> None:
    """Dropout depends on seed, step and role only, so a resumed run draws what an uninterrupted one would."""
    digest = hashlib.sha256(f"{seed}:{step}:{role}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
