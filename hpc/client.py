"""A client: embedding, first blocks, last blocks, LM head, labels and loss. One step, read top to bottom.

Text, labels, logits and loss never leave this process. Shape suffixes: B rows, T tokens, D hidden size, S all valid
tokens of the batch, L label positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from hpc.checkpoint import checkpoint_folder, read_role, write_role
from hpc.config import Config
from hpc.data.collate import Batch
from hpc.data.dataset import ClientData, score_eval
from hpc.errors import NonFinite, ProtocolError
from hpc.learner import Learner, seed_dropout, tail_loss_sum
from hpc.link.channel import Channel
from hpc.link.frame import LOSS_NOT_FINITE, Frame, Header, Kind
from hpc.link.peers import PeerKeys
from hpc.model.part import LabelPositions, Part
from hpc.optim import decide
from hpc.ragged import pack, pad
from hpc.report.events import ClientStep, Evaluation, EventLog
from hpc.schedule import Evaluate, HandOver, Save, TrainStep, batch_index, instructions, total_steps
from hpc.stopwatch import Stopwatch


class Client:
    """One client, linked to its trunk rank."""

    def __init__(
        self,
        *,
        client_id: int,
        config: Config,
        head: Part,
        tail: Part,
        data: ClientData,
        channel: Channel,
        peers: PeerKeys | None,
        log: EventLog,
        device: torch.device,
        folder: Path,
        start: int = 0,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._before_step, self.folder, self.start = before_step, folder, start
        self.client_id, self.config, self.train = client_id, config, config.train
        self.head, self.tail = head.to(device), tail.to(device)
        self.data, self.channel, self.peers, self.log, self.device = data, channel, peers, log, device
        self.learner = Learner([head, tail], config.train)
        self.head_learns = bool(head.trainable())
        self.steps = total_steps(config.train)
        self._watch = Stopwatch()
        if start:
            self._resume()
        self._eval_batches = data.eval_batches(config.train.eval_batch_size)

    def open(self) -> None:
        """Say how many evaluation batches there are; wait for all roles; take up the other clients' public keys."""
        self.channel.send(Header(kind=Kind.READY), torch.tensor([len(self._eval_batches)]))
        self.channel.recv(Kind.READY)
        if self.peers is None:
            return
        message = torch.frombuffer(bytearray(self.peers.public_message()), dtype=torch.uint8)
        self.channel.send(Header(kind=Kind.PEER_KEY), message)
        for _ in range(self.train.clients - 1):
            self.peers.add(self.channel.recv(Kind.PEER_KEY).payload.numpy().tobytes())

    def run(self, before_goodbye: Callable[[], None] = lambda: None) -> None:
        """The whole run, in the order of the schedule; `before_goodbye` runs while the trunk still waits.

        `open` comes first.
        """
        for instruction in instructions(self.train, evaluate=self.config.data.evaluates, start=self.start):
            match instruction:
                case TrainStep() if self.client_id in instruction.clients:
                    self._before_step(instruction.step)
                    self.train_step(instruction.step)
                case Evaluate():
                    self.evaluate(instruction.step)
                case HandOver():
                    self.hand_over(instruction)
                case Save():
                    self.save(instruction.step)
        before_goodbye()
        self.channel.send(Header(kind=Kind.BYE))
        self.channel.recv(Kind.BYE)

    def train_step(self, step: int) -> None:
        """One batch through head, trunk and tail and back, then one optimiser step."""
        before, watch = self.channel.stats.snapshot(), self._watch
        seed_dropout(self.train.seed, step, f"client-{self.client_id}")
        batch = self.data.train_batch(batch_index(self.train, step))

        with watch.measure("total"):
            with watch.measure("head"):
                smashed_BTD = self.head(batch.ids_BT.to(self.device))
            self._send(Kind.SMASHED, step, smashed_BTD.detach(), batch)

            trunk_out = self._recv(Kind.TRUNK_OUT, step)
            scale = trunk_out.header.square_sum
            with watch.measure("tail"):
                trunk_out_BTD = pad(trunk_out.payload, batch.lengths).requires_grad_()
                loss_sum = tail_loss_sum(self.tail, trunk_out_BTD, *self._labels(batch))
                # header.weight: label tokens of all clients in this step, so gradients just add up.
                (loss_sum * scale / trunk_out.header.weight).backward()
            loss = float(loss_sum.detach())
            assert trunk_out_BTD.grad is not None
            self._send(
                Kind.GRAD_TRUNK_OUT,
                step,
                trunk_out_BTD.grad,
                batch,
                flags=0 if math.isfinite(loss) else LOSS_NOT_FINITE,
            )

            if self.head_learns:
                grad_smashed = self._recv(Kind.GRAD_SMASHED, step)
                with watch.measure("head"):
                    smashed_BTD.backward(pad(grad_smashed.payload, batch.lengths))
            self._agree_and_step(step, scale)

        spent = before.until(self.channel.stats)
        seconds = {
            **watch.take(),
            "seal": spent.seal_s,
            "open": spent.open_s,
            "wire": spent.wire_s,
            "wait": spent.wait_s,
        }
        self.log.write(
            ClientStep(
                step=step + 1,
                loss_sum=loss,
                label_tokens=batch.label_tokens,
                tokens=sum(batch.lengths),
                seconds={"head": 0.0, "tail": 0.0, **seconds},
            )
        )

    def _agree_and_step(self, step: int, scale: float) -> None:
        """Tell the partial norm (and share the gradient); learn the global norm; step, or skip with everybody."""
        shared = self.learner.flat_gradient() if self.train.resolved_aggregation == "gradient" else None
        self.channel.send(Header(kind=Kind.PART_GRADS, step=step, square_sum=self.learner.square_sum()), shared)
        reply = self._recv(Kind.STEP, step)
        if shared is not None:
            self.learner.set_flat_gradient(reply.payload)
        norm = reply.header.square_sum
        decision = decide(self.train, scaled_norm=norm, scale=scale, step=step, steps=self.steps)
        if decision.finite:
            with self._watch.measure("tail"):
                self.learner.step(factor=decision.factor, rate=decision.rate)
        elif self.config.model.dtype == "float16":
            self.learner.clear()
        else:
            raise NonFinite(
                f"step {step + 1}: a loss or gradient is not finite; nobody stepped (the trunk names whose)"
            )

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Score the held-out examples through the cut model."""
        for part in (self.head, self.tail):
            part.eval()
        correct = total = 0
        for batch in self._eval_batches:
            self._send(Kind.EVAL_SMASHED, step, self.head(batch.ids_BT.to(self.device)), batch)
            reply = self._recv(Kind.EVAL_TRUNK_OUT, step)
            labels, _ = self._labels(batch)
            logits_LV = self.tail(pad(reply.payload, batch.lengths), labels).float().cpu()
            right, count, _ = score_eval(batch, logits_LV)
            correct, total = correct + right, total + count
        for part in (self.head, self.tail):
            part.train()
        self.log.write(Evaluation(step=step, correct=correct, total=total))

    def hand_over(self, order: HandOver) -> None:
        """Give the parts on, or take them up; sealed between clients, so the server relays what it cannot read."""
        assert self.peers is not None, "the run exchanged no peer keys"
        if self.client_id == order.sender:
            for receiver in order.receivers:
                sealed = self.peers.seal(receiver, self.learner.state())
                self.channel.send(Header(kind=Kind.HANDOVER, step=order.step, micro=receiver), sealed)
        elif self.client_id in order.receivers:
            sealed = self.channel.recv(Kind.HANDOVER).payload
            self.learner.load_state(self.peers.open(order.sender, sealed))

    def save(self, step: int) -> None:
        """Write the client parts beside the others' files; they never leave this client."""
        write_role(self.folder, step, f"client-{self.client_id}", self.learner.state(), {})
        self.channel.send(Header(kind=Kind.READY, step=step))

    def _resume(self) -> None:
        state, _ = read_role(checkpoint_folder(self.folder, self.start), f"client-{self.client_id}")
        self.learner.load_state(state)

    def _recv(self, kind: Kind, step: int) -> Frame:
        frame = self.channel.recv(kind, device=self.device)
        if frame.header.step != step:
            raise ProtocolError(f"the trunk sent {kind.name} of step {frame.header.step}, not {step}")
        return frame

    def _send(self, kind: Kind, step: int, hidden_BTD: torch.Tensor, batch: Batch, *, flags: int = 0) -> None:
        header = Header(kind=kind, step=step, lengths=batch.lengths, weight=float(batch.label_tokens), flags=flags)
        self.channel.send(header, pack(hidden_BTD, batch.lengths))

    def _labels(self, batch: Batch) -> tuple[LabelPositions, torch.Tensor]:
        positions = LabelPositions(
            row_L=batch.label_rows_L.to(self.device), position_L=batch.label_positions_L.to(self.device)
        )
        return positions, batch.label_ids_L.to(self.device)
