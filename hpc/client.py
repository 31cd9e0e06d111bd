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
from hpc.errors import NonFinite
from hpc.learner import Learner, seed_dropout, tail_loss_sum
from hpc.link.channel import Channel
from hpc.link.frame import Frame, Header, Kind
from hpc.link.peers import PeerKeys
from hpc.model.part import LabelPositions, Part
from hpc.optim import LossScale, clip_factor, learning_rate
from hpc.ragged import pack, pad
from hpc.report.events import ClientStep, Evaluation, EventLog
from hpc.schedule import Evaluate, HandOver, Save, TrainStep, batch_index, instructions, total_steps
from hpc.stopwatch import Stopwatch

LOSS_NOT_FINITE = 1  # header flag


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
        self.loss_scale = LossScale.for_dtype(config.model.dtype)
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
            self.peers.add(tensor_of(self.channel.recv(Kind.PEER_KEY)).numpy().tobytes())

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

            trunk_out = self.channel.recv(Kind.TRUNK_OUT, device=self.device)
            with watch.measure("tail"):
                trunk_out_BTD = pad(tensor_of(trunk_out), batch.lengths).requires_grad_()
                loss_sum = tail_loss_sum(self.tail, trunk_out_BTD, *self._labels(batch))
                # header.weight: label tokens of all clients in this step, so gradients just add up.
                (loss_sum * self.loss_scale.value / trunk_out.header.weight).backward()
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
                grad_smashed = self.channel.recv(Kind.GRAD_SMASHED, device=self.device)
                with watch.measure("head"):
                    smashed_BTD.backward(pad(tensor_of(grad_smashed), batch.lengths))
            self._agree_and_step(step)

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

    def _agree_and_step(self, step: int) -> None:
        """Tell the partial norm (and share the gradient); learn the global norm; step, or skip with everybody."""
        shared = self.learner.flat_gradient() if self.train.resolved_aggregation == "gradient" else None
        self.channel.send(Header(kind=Kind.PART_GRADS, step=step, square_sum=self.learner.square_sum()), shared)
        decision = self.channel.recv(Kind.STEP, device=self.device)
        if decision.tensor is not None and shared is not None:
            self.learner.set_flat_gradient(decision.tensor)
        norm = decision.header.square_sum / self.loss_scale.value
        self._decide(step, norm)

    def _decide(self, step: int, norm: float) -> None:
        finite = math.isfinite(norm)
        if not finite and not self.loss_scale.dynamic:
            raise NonFinite(f"step {step + 1}: loss or gradient is not finite; nobody stepped (the trunk names whose)")
        scale = self.loss_scale.value
        self.loss_scale.update(finite=finite)
        if finite:
            factor = clip_factor(norm, self.train.max_grad_norm) / scale
            with self._watch.measure("tail"):
                self.learner.step(factor=factor, rate=learning_rate(self.train, step, self.steps))
        else:
            self.learner.clear()

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Score the held-out examples through the cut model."""
        for part in (self.head, self.tail):
            part.eval()
        correct = total = 0
        for batch in self._eval_batches:
            self._send(Kind.EVAL_SMASHED, step, self.head(batch.ids_BT.to(self.device)), batch)
            reply = self.channel.recv(Kind.EVAL_TRUNK_OUT, device=self.device)
            labels, _ = self._labels(batch)
            logits_LV = self.tail(pad(tensor_of(reply), batch.lengths), labels).float().cpu()
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
            sealed = tensor_of(self.channel.recv(Kind.HANDOVER))
            self.learner.load_state(self.peers.open(order.sender, sealed))

    def save(self, step: int) -> None:
        """Write the client parts beside the others' files; they never leave this client."""
        write_role(self.folder, step, f"client-{self.client_id}", self.learner.state(), self.loss_scale.state())
        self.channel.send(Header(kind=Kind.READY, step=step))

    def _resume(self) -> None:
        state, facts = read_role(checkpoint_folder(self.folder, self.start), f"client-{self.client_id}")
        self.learner.load_state(state)
        self.loss_scale.load(facts)

    def _send(self, kind: Kind, step: int, hidden_BTD: torch.Tensor, batch: Batch, *, flags: int = 0) -> None:
        header = Header(kind=kind, step=step, lengths=batch.lengths, weight=float(batch.label_tokens), flags=flags)
        self.channel.send(header, pack(hidden_BTD, batch.lengths))

    def _labels(self, batch: Batch) -> tuple[LabelPositions, torch.Tensor]:
        positions = LabelPositions(
            row_L=batch.label_rows_L.to(self.device), position_L=batch.label_positions_L.to(self.device)
        )
        return positions, batch.label_ids_L.to(self.device)


def tensor_of(frame: Frame) -> torch.Tensor:
    """The payload of a frame whose kind always has one."""
    assert frame.tensor is not None, f"{frame.header.kind.name} came without a tensor"
    return frame.tensor
