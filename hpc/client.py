"""A client: embedding, first blocks, last blocks, LM head, labels and loss.

Text, labels, logits and loss never leave this process. One training step is in `hpc.client_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch

from hpc.acts import Recv, Send
from hpc.checkpoint import UNNAMED, Attempt, checkpoint_folder, read_role, read_stamp, step_of
from hpc.client_evaluation import HeldOut
from hpc.client_side import ClientSide
from hpc.client_step import ClientStepRun
from hpc.config import Config
from hpc.contribution import MaskedContribution
from hpc.data.dataset import ClientData
from hpc.early_stopping import Patience
from hpc.errors import BudgetSpent, CheckpointError, Paused, ProtocolError
from hpc.export.save import save_client_adapter
from hpc.fellows import Fellows
from hpc.learner import Learner
from hpc.link.channel import Channel
from hpc.link.frame import HAS_START, NEEDS_STATE, NOT_WRITTEN, WOULD_STOP, Header
from hpc.link.kinds import Kind
from hpc.link.limits import WIDEST
from hpc.link.peers import PeerKeys
from hpc.model.part import Part
from hpc.privacy.defences.detector import make_detector
from hpc.privacy.defences.prepare import shield_for
from hpc.privacy.defences.telling import told
from hpc.privacy.recording import ClientRecorder
from hpc.programs import Traits, client_step, client_sync
from hpc.report.events import ClientStep, EventLog
from hpc.saving import Saver, from_payload
from hpc.schedule import Evaluate, HandOver, Instruction, Save, Sync, TrainStep, instructions, total_steps
from hpc.smashed_cache import CacheBook
from hpc.stopping import paused_words
from hpc.stopwatch import Stopwatch
from hpc.trunk_link import PauseAsked, TrunkLink

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
        self.needs_state, self._has_start, self._resumed_from = needs_state, has_start, start
        self._before_step, self.folder, self.start, self.attempt = before_step, folder, start, attempt
        self.client_id, self.config, self.train = client_id, config, config.train
        self.head, self.tail = head.to(device), tail.to(device)
        self.data, self.channel, self.log, self.device = data, channel, log, device
        self.shield = shield_for(config, data, folder)
        self.learner = Learner([head, tail], config.train)
        self.traits = Traits.of(config)
        self.link = TrunkLink(channel, client_id=client_id, device=device, reads_ahead=self.traits.first_come)
        self._watch = Stopwatch()
        self._schedule: list[Instruction] = []  # where there is a budget: to look ahead
        self._excess = ""  # why the budget does not allow what comes next
        self._patience = Patience(config.train.early_stopping_patience)
        self.fellows = Fellows(
            client_id=client_id,
            train=self.train,
            link=self.link,
            learner=self.learner,
            peers=peers,
            make_peers=make_peers,
        )
        self.side = self._make_side()
        self._held_out = HeldOut(self.side, config, data, log)
        self.saver = Saver(config=config, folder=folder, role=f"client-{client_id}", attempt=attempt, log=log)
        self.link.on_welcome = self.fellows.welcome
        if start and has_start:
            self._has_start = self._resume()

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
            peers=self.fellows.peers,
            book=CacheBook(limit_bytes=share, token_bytes=hidden_size * dtype.itemsize)
            if config.caches_smashed
            else None,
            steps=total_steps(config.train),
            skips=config.train.on_nonfinite == "skip" or config.model.dtype == "float16",
            hidden_size=hidden_size,
            dtype=dtype,
            device=self.device,
            watch=self._watch,
            shield=self.shield,
            recorder=self._make_recorder(),
            detector=make_detector(config.privacy.detector),
        )

    def _make_recorder(self) -> ClientRecorder | None:
        """One that comes back in mid-run keeps what it recorded before."""
        return ClientRecorder.of(
            self.config, self.folder, self.client_id, self.channel, None if self.needs_state else self.start
        )

    def open(self) -> None:
        """Say how much data there is; take up the others' public keys, and what they have learned if it is needed.

        Returns when all roles are ready; `start` is then the step to begin behind.
        """
        told = torch.tensor([len(self._held_out.batches), len(self.data.train_rows), self.learner.values])
        self.link.channel.limits.set((Kind.STEP, Kind.AVERAGE), WIDEST * self.learner.values)
        asks = self.needs_state and self.train.shares_state
        flags = (NEEDS_STATE if asks else 0) | (HAS_START if self._has_start else 0)
        self.link.send(Header(kind=Kind.READY, flags=flags), told)
        if asks or self.train.clients_meet:
            self.fellows.send_key(step=0)
        try:
            frame = self.fellows.hear_until_ready(self.config.link.start_patience_s)
        except PauseAsked:
            raise Paused("the run was paused before this client was taken in; start it with the run again") from None
        self.start, samples = frame.header.step, frame.payload.tolist()
        self.fellows.samples = samples
        if samples[self.client_id : self.client_id + 1] != [len(self.data.train_rows)]:
            raise ProtocolError(f"the trunk says that this client has other than {len(self.data.train_rows)} examples")
        if self.needs_state and not self.train.shares_state:
            self._take_up_own()

    def run(self, before_goodbye: Callable[[], None] = lambda: None) -> None:
        """The whole run, in the order of the schedule; `before_goodbye` runs while the trunk still waits.

        `open` comes first. Raises `Paused` if the trunk ends the run to be resumed.
        """
        self._tell_privacy("planned", self.start)
        try:
            self._follow_the_schedule()
            self._tell_privacy("released", total_steps(self.train))
            if self.config.run.save_adapter:
                save_client_adapter(self.folder, self.config, self.client_id, self.learner.parameters, self.link)
            before_goodbye()
            self.link.send(Header(kind=Kind.BYE))
            self.link.recv_next(Kind.BYE)
        except PauseAsked as asked:
            self._pause(asked.step)
        except BudgetSpent:
            if not self._excess:
                raise
            try:
                self.link.recv_next(Kind.BYE)  # it was told, and asks for a pause
            except PauseAsked as asked:
                self._pause(asked.step)

    def _pause(self, step: int) -> NoReturn:
        done = step > 0 and (step == self._resumed_from or self.save(step))
        words = paused_words(step, checkpoint=done)
        if self._excess:
            raise BudgetSpent(f"{self._excess}; {words}") from None
        raise Paused(words) from None

    def _tell_privacy(self, when: str, step: int) -> None:
        """What noise there is, and what it promises, in the log and in the events."""
        if self.config.privacy.defends:
            figures = self.shield.figures()
            _log.info("privacy, %s: %s", when, told(figures, self.config))
            self.log.note("privacy", step=step, **figures)

    def _follow_the_schedule(self) -> None:
        schedule: Iterable[Instruction] = instructions(
            self.train, evaluate=self.config.data.evaluates, start=self.start
        )
        account = self.shield.account
        if account is not None and account.is_limited:
            schedule = self._schedule = list(schedule)
        for place, instruction in enumerate(schedule):
            match instruction:
                case TrainStep():
                    self.train_step(instruction, is_spent=partial(self._is_spent, place))
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

    def _is_spent(self, place: int) -> bool:
        """Whether the budget ends before this client's next step, as the schedule goes on behind `place`."""
        rows, evaluations = list[int](), 0
        for instruction in islice(self._schedule, place + 1, None):
            evaluations += isinstance(instruction, Evaluate)
            if isinstance(instruction, TrainStep) and self.client_id in instruction.clients:
                rows = self.data.row_numbers(instruction.batch_of(self.client_id))
                break
        if self._schedule and self.shield.account is not None:
            book = self.side.book
            sent = [row for row in rows if book is None or not book.holds(row)]
            self._excess = self.shield.account.excess(rows, sent, evaluations=evaluations)
        return bool(self._excess)

    def train_step(self, order: TrainStep, *, is_spent: Callable[[], bool] = lambda: False) -> None:
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
            run = ClientStepRun(self.side, order, batch, self.data.row_numbers(number), is_spent=is_spent)
            for act in program:
                run.carry_out(act)
        if batch is None:
            return
        self.fellows.drifted = self.train.averages  # until the next average this client's parts are its own
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
        masked, self.fellows.drifted = None, False
        for act in client_sync(order, self.traits, self.client_id):
            match act:
                case Send(kind=Kind.PARTS):
                    weight = float(self.fellows.samples[self.client_id])
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
        samples = self.fellows.samples
        share = samples[self.client_id] / sum(samples[client] for client in order.clients)
        vector = self.learner.flat_values().double() * share
        return MaskedContribution(
            vector,
            size=len(vector),
            peers=self.fellows.keys(),
            client_id=self.client_id,
            cohort=order.clients,
            step=order.step,
            context=f"examples {samples}",
        )

    def evaluate(self, step: int) -> None:
        """Score the held-out examples through the cut model."""
        self._patience.take(self._held_out.evaluate(step))

    def _votes_to_end(self, step: int) -> bool:
        """Say whether this client would stop, and learn whether the run does; no loss is told."""
        if not self.train.early_stopping_patience:
            return False
        flags = WOULD_STOP if self._patience.exhausted else 0
        self.link.send(Header(kind=Kind.VOTE, step=step, flags=flags))
        return bool(self.link.recv(Kind.VERDICT, step).header.flags & WOULD_STOP)

    def hand_over(self, order: HandOver) -> None:
        """Give the parts on, or take them up; sealed between clients, so the server relays what it cannot read."""
        if self.client_id == order.sender:
            for receiver in order.receivers:
                self.fellows.give(receiver, order.step)
        elif self.client_id in order.receivers:
            self.fellows.take(order.sender)

    def save(self, step: int) -> bool:
        """Write the client parts, which never leave this client; learn which checkpoints there are from now on.

        Returns whether there is one of this step.
        """
        state, facts = self.learner.state(), {**self._patience.state(), **self.shield.state()}
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
                self.shield.check(facts)
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
        self.shield.check(facts)
        self.learner.load_state(state)
        self._patience.load(facts)
        return True
