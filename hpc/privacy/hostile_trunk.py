"""A trunk that follows the protocol of a training step to the letter, but returns gradients of its own making.

For experiments and tests: it plays the server's end of one client's link, so that an attack meets the client's real
code. Its blocks are the public ones and do not learn. Schedules whose trunk takes what comes first are not played.

Shape suffixes: B rows, T tokens, D hidden size, S valid tokens of all rows together.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from hpc.acts import Backward, Forward, Micro, Recv, Send
from hpc.link.channel import Channel
from hpc.link.frame import Frame, Header
from hpc.link.kinds import Kind
from hpc.model.part import Part
from hpc.privacy.seen import Seen
from hpc.programs import Traits, trunk_step
from hpc.ragged import pack, pad
from hpc.schedule import TrainStep


class MakesGradients(Protocol):
    """Such as `hpc.privacy.attacks.fsha.Hijacker`."""

    def gradient(self, smashed_SD: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """What to return instead of the gradient of the client's loss, `_SD`."""


class HostileTrunk:
    """One client's trunk; `seen` is what it got to see."""

    def __init__(
        self,
        *,
        channel: Channel,
        part: Part,
        traits: Traits,
        client_id: int,
        hijacker: MakesGradients | None,
        careful: bool = True,
    ) -> None:
        """`hijacker`: None for a trunk that is honest after all. `careful`: return nothing behind the last position
        that the client's gradient reaches, where an honest causal trunk could not."""
        self._channel, self._part, self._traits = channel, part, traits
        self._client, self._hijacker, self._careful = client_id, hijacker, careful
        self.seen: list[Seen] = []
        self._frames: dict[Kind, Frame] = {}
        self._smashed: dict[Micro, torch.Tensor] = {}
        self._out: dict[Micro, torch.Tensor] = {}

    def serve(self, order: TrainStep) -> None:
        """One training step. Raises what the link raises."""
        for act in trunk_step(order, self._traits, [self._client]):
            match act:
                case Recv():
                    self._frames[act.kind] = self._channel.recv(act.kind)
                case Forward():
                    self._forward(act.batch[0])
                case Backward():
                    self._backward(act.batch[0], order.step)
                case Send():
                    self._send(act, order.step)

    def _forward(self, micro: Micro) -> None:
        frame = self._frames[Kind.SMASHED]
        smashed_BTD = pad(frame.payload, frame.header.lengths).detach().requires_grad_()
        self._smashed[micro], self._out[micro] = smashed_BTD, self._part(smashed_BTD)

    def _backward(self, micro: Micro, step: int) -> None:
        frame, smashed_BTD = self._frames[Kind.GRAD_TRUNK_OUT], self._smashed.pop(micro)
        lengths, out_BTD = frame.header.lengths, self._out[micro]
        smashed_SD = pack(smashed_BTD.detach(), lengths)
        self.seen.append(
            Seen(
                client_id=self._client,
                step=step,
                lengths=lengths,
                smashed_SD=smashed_SD.float(),
                grad_trunk_out_SD=frame.payload.float(),
                trunk_out_SD=pack(out_BTD.detach(), lengths).float(),
                label_tokens=int(self._frames[Kind.SMASHED].header.weight),
            )
        )
        if self._hijacker is None:
            (returned_BTD,) = torch.autograd.grad(out_BTD, smashed_BTD, pad(frame.payload, lengths))
            self._out[micro] = returned_BTD
        else:
            own_SD = self._hijacker.gradient(smashed_SD.float(), lengths)
            made_SD = plausible(own_SD, frame.payload.float(), lengths, careful=self._careful)
            self._out[micro] = pad(made_SD.to(frame.payload.dtype), lengths)

    def _send(self, act: Send, step: int) -> None:
        header, shares = self._frames[Kind.SMASHED].header, self._traits.shares_gradient
        if act.kind is Kind.STEP:
            part_grads = self._frames[Kind.PART_GRADS]
            norm = math.sqrt(part_grads.header.square_sum)
            said = Header(kind=Kind.STEP, step=step, square_sum=norm, weight=1.0)
            self._channel.send(said, part_grads.payload if shares else None)
            return
        said = Header(kind=act.kind, step=step, lengths=header.lengths, weight=header.weight, square_sum=1.0)
        self._channel.send(said, pack(self._out[act.micro].detach(), header.lengths).contiguous())


def plausible(own_SD: torch.Tensor, sent_SD: torch.Tensor, lengths: tuple[int, ...], *, careful: bool) -> torch.Tensor:
    """The gradient as long as the one that the client sent; `careful`: and nothing where no honest one would be."""
    rows = []
    for own_TD, sent_TD in zip(own_SD.split(list(lengths)), sent_SD.split(list(lengths)), strict=True):
        reached_T = sent_TD.abs().amax(-1).flip(0).cummax(0).values.flip(0) > 0
        rows.append(own_TD * reached_T[:, None] if careful else own_TD)
    made_SD = torch.cat(rows)
    scaled_SD: torch.Tensor = made_SD * (sent_SD.norm() / made_SD.norm().clamp_min(1e-30))
    return scaled_SD
