"""A client: embedding, first blocks, last blocks, LM head, labels and loss.

Text, labels, logits and loss never leave this process. One training step is in `hpc.client_step`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from hpc.acts import Recv, Send
from hpc.checkpoint import UNNAMED, Attempt, checkpoint_folder, read_role, read_stamp, step_of
from hpc.client_side import ClientSide
from hpc.client_step import ClientStepRun
from hpc.config import Config
from hpc.contribution import MaskedContribution
from hpc.data.dataset import ClientData, score_eval
from hpc.early_stopping import Patience
from hpc.errors import CheckpointError, IdentityError, LinkError, Paused, ProtocolError
from hpc.export.save import save_client_adapter
from hpc.layouts import layout_numbers
from hpc.learner import Learner
from hpc.link.channel import Channel
from hpc.link.frame import DONATES, HAS_START, NEEDS_STATE, NOT_WRITTEN, WOULD_STOP, Frame, Header
from hpc.link.kinds import Kind
from hpc.link.peers import PeerKeys
from hpc.matches import Decoded, decode_held_out
from hpc.model.continued import ContinuedLM
from hpc.model.part import Part
from hpc.predictions import write_predictions
from hpc.programs import Traits, client_step, client_sync
from hpc.ragged import pad
from hpc.report.events import ClientStep, Evaluation, EventLog
from hpc.saving import Saver, from_payload
from hpc.schedule import Evaluate, HandOver, Save, Sync, TrainStep, instructions, total_steps
from hpc.smashed_cache import CacheBook
from hpc.split_chain import SplitChains
from hpc.stopping import paused_words
from hpc.stopwatch import Stopwatch
from hpc.trunk_link import PauseAsked, TrunkLink

_log = logging.getLogger("hpc")

_log = logging.getLogger("hpc")


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
        attempt: Attempt = UNNAMED,
        needs_state: bool = False,
        has_start: bool = True,
        make_peers: Callable[[], PeerKeys] | None = None,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`needs_state`: it may lack what the clients have learned, and asks them for it; `has_start`: it has a file in
        the checkpoint at `start`; `make_peers`: its keys for other clients, where a run without need of them has one
        that comes back.
        """
        self.needs_state, self._has_start, self._make_peers = needs_state, has_start, make_peers
        self._resumed_from, self._drifted = start, False
        self._before_step, self.folder, self.start, self.attempt = before_step, folder, start, attempt
        self.client_id, self.config, self.train = client_id, config, config.train
        self.head, self.tail = head.to(device), tail.to(device)
        self.data, self.channel, self.peers, self.log, self.device = data, channel, peers, log, device
        self.learner = Learner([head, tail], config.train)
        self.traits = Traits.of(config)
        self.link = TrunkLink(channel, client_id=client_id, device=device, reads_ahead=self.traits.first_come)
        self._watch = Stopwatch()
        self._patience = Patience(config.train.early_stopping_patience)
        self._samples: list[int] = []  # of every client, told by the trunk
        self.side = self._make_side()
        self.saver = Saver(config=config, folder=folder, role=f"client-{client_id}", attempt=attempt, log=log)
        self.link.on_welcome = self._welcome
        if start and has_start:
            self._has_start = self._resume()
        self._eval_batches = data.eval_batches(config.train.eval_batch_size)

    def _make_side(self) -> ClientSide:
        config, hidden_size = self.config, self.head.hidden_size
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        share = config.trunk.smashed_cache_bytes // config.train.clients
        return ClientSide(
            client_id=self.client_id,
            train=config.train,
            traits=self.traits,
            head=self.head,
            tail=self.tail,
            learner=self.learner,
            link=self.link,
            peers=self.peers,
            book=CacheBook(limit_bytes=share, token_bytes=hidden_size * dtype.itemsize)
            if config.caches_smashed
            else None,
            steps=total_steps(config.train),
            skips=config.train.on_nonfinite == "skip" or config.model.dtype == "float16",
            hidden_size=hidden_size,
            dtype=dtype,
            device=self.device,
            watch=self._watch,
        )

    def open(self) -> None:
        """Say how much data there is; take up the others' public keys, and what they have learned if it is needed.

        Returns when all roles are ready; `start` is then the step to begin behind.
        """
        told = torch.tensor([len(self._eval_batches), len(self.data.train_rows), self.learner.values])
        asks = self.needs_state and self.train.shares_state
        flags = (NEEDS_STATE if asks else 0) | (HAS_START if self._has_start else 0)
        self.link.send(Header(kind=Kind.READY, flags=flags), told)
        if asks or self.train.clients_meet:
            self._send_key(step=0)
        try:
            frame = self._hear_all_until_ready()
        except PauseAsked:
            raise Paused("the run was paused before this client was taken in; start it with the run again") from None
        self.start, self._samples = frame.header.step, frame.payload.tolist()
        if self._samples[self.client_id : self.client_id + 1] != [len(self.data.train_rows)]:
            raise ProtocolError(f"the trunk says that this client has other than {len(self.data.train_rows)} examples")
        if self.needs_state and not self.train.shares_state:
            self._take_up_own()

    def _hear_all_until_ready(self) -> Frame:
        due, patience_s = (Kind.PEER_KEY, Kind.HANDOVER, Kind.READY), self.config.link.start_patience_s
        while (frame := self.link.recv_next(*due, patience_s=patience_s)).header.kind is not Kind.READY:
            if frame.header.kind is Kind.PEER_KEY:
                self._peers().add(frame.payload.numpy().tobytes())
            else:
                self.learner.load_state(self._peers().open(frame.header.micro, frame.payload))
        return frame

    def _send_key(self, step: int) -> None:
        message = torch.frombuffer(bytearray(self._peers().public_message()), dtype=torch.uint8)
        self.link.send(Header(kind=Kind.PEER_KEY, step=step), message)

    def _peers(self) -> PeerKeys:
        if self.peers is None:
            assert self._make_peers is not None, "only where clients may come back"
            self.peers = self._make_peers()
        return self.peers

    def _welcome(self, told: Frame, key: Frame) -> None:
        """Another client has come: know its key, and give it what the clients have learned if this one is asked to.

        That is what was learned up to the last step: whatever has begun of the next does not count yet.
        """
        comer, step, donates = told.header.micro, told.header.step, bool(told.header.flags & DONATES)
        if donates and not (self.train.shares_state and not self._drifted):
            raise ProtocolError(
                f"the trunk wants this client's own parts for client {comer}; nobody else may have them"
            )
        self._samples = told.payload.tolist()
        if not donates and not self.train.clients_meet:
            return
        try:
            self._peers().add(key.payload.numpy().tobytes())
        except (IdentityError, LinkError) as error:
            if not donates:
                raise
            _log.warning("client %d cannot give client %d what was learned: %s", self.client_id, comer, error)
            self._send_key(step)
            self.link.send(Header(kind=Kind.HANDOVER, step=step, micro=comer, flags=NOT_WRITTEN))
            return
        if donates:
            self._send_key(step)
            sealed = self._peers().seal(comer, self.learner.state())
            self.link.send(Header(kind=Kind.HANDOVER, step=step, micro=comer), sealed)

    def run(self, before_goodbye: Callable[[], None] = lambda: None) -> None:
        """The whole run, in the order of the schedule; `before_goodbye` runs while the trunk still waits.

        `open` comes first. Raises `Paused` if the trunk ends the run to be resumed.
        """
        try:
            self._follow_the_schedule()
            if self.config.run.save_adapter:
                save_client_adapter(self.folder, self.config, self.client_id, self.learner.parameters, self.link)
            before_goodbye()
            self.link.send(Header(kind=Kind.BYE))
            self.link.recv_next(Kind.BYE)
        except PauseAsked as asked:
            done = asked.step > 0 and (asked.step == self._resumed_from or self.save(asked.step))
            raise Paused(paused_words(asked.step, checkpoint=done)) from None

    def _follow_the_schedule(self) -> None:
        for instruction in instructions(self.train, evaluate=self.config.data.evaluates, start=self.start):
            match instruction:
                case TrainStep():
                    self.train_step(instruction)
                case Sync():
                    self.sync(instruction)
                case Evaluate():
                    self.evaluate(instruction.step)
                    if self._votes_to_end(instruction.step):
                        break
                case HandOver():
                    self.hand_over(instruction)
                case Save():
                    self.save(instruction.step)

    def train_step(self, order: TrainStep) -> None:
        """One batch through head, trunk and tail and back, then one optimiser step."""
        program = list(client_step(order, self.traits, self.client_id))
        if not program:
            return
        taking_part = self.client_id in order.clients
        if taking_part:
            self._before_step(order.step)
        before, watch = self.link.stats(), self._watch
        watch.take()
        number = order.batch_of(self.client_id) if taking_part else 0
        batch = self.data.train_batch(number) if taking_part else None
        with watch.measure("total"):
            run = ClientStepRun(self.side, order, batch, self.data.row_numbers(number))
            for act in program:
                run.carry_out(act)
        if batch is None:
            return
        self._drifted = self.train.averages  # until the next average this client's parts are its own
        spent = before.until(self.link.stats())
        link = {"seal": spent.seal_s, "open": spent.open_s, "wire": spent.wire_s, "wait": spent.wait_s}
        self.log.write(
            ClientStep(
                step=order.step + 1,
                loss_sum=run.loss_sum,
                label_tokens=batch.label_tokens,
                tokens=sum(batch.lengths),
                seconds={"head": 0.0, "tail": 0.0, **watch.take(), **link},
            )
        )

    def sync(self, order: Sync) -> None:
        """Give the client parts to be averaged and take up the average (FedAvg, McMahan et al., 2017)."""
        masked, self._drifted = None, False
        for act in client_sync(order, self.traits, self.client_id):
            match act:
                case Send(kind=Kind.PARTS):
                    weight = float(self._samples[self.client_id])
                    header = Header(kind=Kind.PARTS, step=order.step, weight=weight)
                    self.link.send(header, self.learner.flat_values())
                case Send():
                    masked = masked or self._masked_values(order)
                    self.link.send(*masked.outgoing(act.kind))
                case Recv(kind=Kind.AVERAGE):
                    average = self.link.recv(Kind.AVERAGE, order.step).tensor
                    if average is not None:  # else nobody of the round is left
                        self.learner.set_flat_values(average)
                case Recv():
                    assert masked is not None, "only a secure round gets a roster"
                    masked.take(self.link.recv(act.kind, order.step, on_device=False))

    def _masked_values(self, order: Sync) -> MaskedContribution:
        """Weighted before masking: the server adds up what it cannot read, and divides by the weights that came."""
        assert self.peers is not None, "the run exchanged no peer keys"
        share = self._samples[self.client_id] / sum(self._samples[client] for client in order.clients)
        vector = self.learner.flat_values().double() * share
        return MaskedContribution(
            vector,
            size=len(vector),
            peers=self.peers,
            client_id=self.client_id,
            cohort=order.clients,
            step=order.step,
            context=f"examples {self._samples}",
        )

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Score the held-out examples through the cut model."""
        for part in (self.head, self.tail):
            part.eval()
        correct = total = label_tokens = 0
        losses: list[float] = []
        predictions: list[int] = []
        for batch in self._eval_batches:
            layout_B2 = self.head.layout_of(batch.ids_BT)
            self.link.send_rows(
                Kind.EVAL_SMASHED,
                step,
                self.head(batch.ids_BT.to(self.device)),
                batch.lengths,
                layout=layout_numbers(layout_B2),
            )
            reply = self.link.recv(Kind.EVAL_TRUNK_OUT, step)
            labels, _ = self.side.labels(batch)
            logits_LV = self.tail(pad(reply.payload, batch.lengths), labels, layout_B2).float().cpu()
            score = score_eval(batch, logits_LV)
            correct, total = correct + score.correct, total + score.total
            label_tokens += score.label_tokens
            losses.append(score.loss_sum)
            predictions += score.predictions
        decoded = self._decoded() if self.config.data.decodes else Decoded()
        for part in (self.head, self.tail):
            part.train()
        loss_sum = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        if self.config.data.save_predictions:
            write_predictions(self.log.path.parent, step, self.data, predictions, decoded.texts)
        self._patience.take(loss_sum / label_tokens if label_tokens else math.nan)
        found = f"{correct} of {total} right" if self.data.chooses else f"{total} texts"
        _log.info("evaluation after step %d: %s", step, found)
        self.log.write(
            Evaluation(
                step=step,
                correct=correct if self.data.chooses else None,
                total=total,
                loss_sum=loss_sum,
                label_tokens=label_tokens,
                matched=decoded.matched,
            )
        )

    def _decoded(self) -> Decoded:
        """Decode the answers to the held-out examples, the trunk's keys and values staying there."""
        chains = SplitChains(self.head, self.tail, self.link)
        model = ContinuedLM(self.head.model.config, chains.open, device=self.device)
        decoded = decode_held_out(model, self.data, self.config)
        chains.enough()
        return decoded

    def _votes_to_end(self, step: int) -> bool:
        """Say whether this client would stop, and learn whether the run does; no loss is told."""
        if not self.train.early_stopping_patience:
            return False
        flags = WOULD_STOP if self._patience.exhausted else 0
        self.link.send(Header(kind=Kind.VOTE, step=step, flags=flags))
        return bool(self.link.recv(Kind.VERDICT, step).header.flags & WOULD_STOP)

    def hand_over(self, order: HandOver) -> None:
        """Give the parts on, or take them up; sealed between clients, so the server relays what it cannot read."""
        assert self.peers is not None, "the run exchanged no peer keys"
        if self.client_id == order.sender:
            for receiver in order.receivers:
                sealed = self.peers.seal(receiver, self.learner.state())
                self.link.send(Header(kind=Kind.HANDOVER, step=order.step, micro=receiver), sealed)
        elif self.client_id in order.receivers:
            sealed = self.link.recv_next(Kind.HANDOVER).payload
            self.learner.load_state(self.peers.open(order.sender, sealed))

    def save(self, step: int) -> bool:
        """Write the client parts, which never leave this client; learn which checkpoints there are from now on.

        Returns whether there is one of this step.
        """
        state, facts = self.learner.state(), self._patience.state()
        written = self.saver.write(step, f"client-{self.client_id}", state, facts)
        self.link.send(Header(kind=Kind.READY, step=step, flags=0 if written else NOT_WRITTEN))
        kept = from_payload(self.link.recv(Kind.READY, step, on_device=False).payload)
        self.saver.finish(step, kept)
        return bool(kept)

    def _take_up_own(self) -> None:
        """Where each client keeps its own parts: the last that this one wrote, if it did."""
        name = f"client-{self.client_id}"
        for folder in sorted(self.folder.glob("checkpoint-*"), key=step_of, reverse=True):
            if 0 < step_of(folder) <= self.start and self._is_own(folder / f"{name}.safetensors", step_of(folder)):
                state, facts = read_role(folder, name)
                self.learner.load_state(state)
                self._patience.load(facts)
                _log.warning("%s goes on with its own parts of step %d", name, step_of(folder))
                return
        _log.warning("%s has no checkpoint of its own parts; they begin anew", name)

    def _is_own(self, path: Path, step: int) -> bool:
        """Whether this attempt of the run wrote it, or the one that it goes on from, up to there."""
        try:
            writer = read_stamp(path).attempt
        except CheckpointError:
            return False
        return writer == self.attempt.name or (writer == self.attempt.takes_up and step <= self._resumed_from)

    def _resume(self) -> bool:
        """Take up the checkpoint; False if it cannot be read where others can give what is in it."""
        folder, role = checkpoint_folder(self.folder, self.start), f"client-{self.client_id}"
        try:
            state, facts = read_role(folder, role, attempt=self.attempt.takes_up)
        except CheckpointError:
            if not self.needs_state:
                raise
            return False
        self.learner.load_state(state)
        self._patience.load(facts)
        return True
