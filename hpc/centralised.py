"""The baseline: the uncut model in one process, trained on the clients' own batches.

Nothing here knows of links or of DeepSpeed. Shape suffixes: B rows, T tokens, L label positions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hpc.checkpoint import UNNAMED, Attempt, checkpoint_folder, read_role
from hpc.config import Config
from hpc.data.collate import Batch, union
from hpc.data.dataset import ClientData, score_eval
from hpc.early_stopping import Patience, majority
from hpc.errors import NonFinite, Paused
from hpc.export.save import save_centralised_adapter
from hpc.learner import Learner, seed_dropout, tail_loss_sum
from hpc.matches import Decoded, decode_held_out
from hpc.model.continued import ContinuedLM, WholeChain
from hpc.model.part import LabelPositions, Part
from hpc.optim import MAX_SKIPS, Decision, LossScale, decide, global_norm, square_sum
from hpc.predictions import write_predictions
from hpc.report.events import Evaluation, EventLog, WholeStep
from hpc.saving import Saver
from hpc.schedule import Evaluate, HandOver, Save, Sync, TrainStep, instructions, total_steps
from hpc.source.cut import Cut
from hpc.stopping import paused_words

ROLE = "centralised"

_log = logging.getLogger("hpc")


class Centralised:
    """The whole model and every client's data."""

    def __init__(
        self,
        *,
        config: Config,
        cut: Cut,
        model: Part,
        data: list[ClientData],
        log: EventLog,
        device: torch.device,
    ) -> None:
        self.config, self.train, self.cut, self.log, self.device = config, config.train, cut, log, device
        self.model = model.to(device)
        self.data = data
        self.learner = Learner([model], config.train)
        self.loss_scale = LossScale.for_dtype(config.model.dtype)
        self.steps = total_steps(config.train)
        self._patience = [Patience(config.train.early_stopping_patience) for _ in data]
        self._skipped = 0
        if config.trunk.activation_checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def run(
        self,
        folder: Path,
        *,
        start: int = 0,
        attempt: Attempt = UNNAMED,
        before_step: Callable[[int], None] = lambda step: None,
        after_step: Callable[[int], None] = lambda step: None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """The whole run, in the order of the schedule, from the checkpoint at `start` in `folder` if that is not 0.

        Raises `Paused`, with a checkpoint written, once `stop_asked`.
        """
        saver = Saver(config=self.config, folder=folder, role=ROLE, attempt=attempt, log=self.log)
        if start:
            state, facts = read_role(checkpoint_folder(folder, start), ROLE, attempt=attempt.takes_up)
            self.learner.load_state(state)
            self.loss_scale.load(facts)
            for client, patience in enumerate(self._patience):
                patience.load({key: facts[f"{client}/{key}"] for key in patience.state()})
        boundary = -1
        for instruction in instructions(self.train, evaluate=self.config.data.evaluates, start=start):
            if instruction.step > boundary and not isinstance(instruction, (Sync, Save)):
                boundary = instruction.step
                if stop_asked():
                    done = boundary > 0 and (boundary == start or self._save(saver, boundary))
                    raise Paused(paused_words(boundary, checkpoint=done))
            match instruction:
                case TrainStep():
                    before_step(instruction.step)
                    self.train_step(instruction)
                    after_step(instruction.step)
                case Evaluate():
                    self.evaluate(instruction.step)
                    if majority(sum(patience.exhausted for patience in self._patience), len(self._patience)):
                        self.log.note("early_stop", step=instruction.step)
                        break
                case Save():
                    self._save(saver, instruction.step)
                case HandOver() | Sync():
                    pass  # one process holds everything
        if self.config.run.save_adapter:
            save_centralised_adapter(folder, self.config, self.learner.parameters)

    def _save(self, saver: Saver, step: int) -> bool:
        """Whether there is a checkpoint of this step now."""
        written = saver.write(step, ROLE, self.learner.state(), self.loss_scale.state() | _numbered(self._patience))
        kept = saver.commit(step) if written else []
        saver.finish(step, kept)
        return bool(kept)

    def train_step(self, order: TrainStep) -> float:
        """The batches of the step's clients as one; returns the wall seconds of the step."""
        start, step = time.perf_counter(), order.step
        seed_dropout(self.train.seed, step, "centralised")
        batches = [self.data[c].train_batch(order.batch_of(c)) for c in order.clients]
        batch = union(batches)
        loss_sum = tail_loss_sum(self.model, batch.ids_BT.to(self.device), *self._labels(batch))
        (loss_sum * self.loss_scale.value / float(batch.label_tokens)).backward()
        decision = self._step(step)
        seconds = time.perf_counter() - start
        self.log.write(
            WholeStep(
                step=step + 1,
                loss_sum=float(loss_sum.detach()),
                label_tokens=batch.label_tokens,
                tokens=sum(batch.lengths),
                seconds={"total": seconds},
                learning_rate=decision.rate,
                grad_norm=decision.norm,
                skipped=not decision.finite,
            )
        )
        return seconds

    def _step(self, step: int) -> Decision:
        scale = self.loss_scale.value
        decision = decide(self.train, scaled_norm=self._norm(), scale=scale, step=step, steps=self.steps)
        self._skipped = 0 if decision.finite else self._skipped + 1
        overflowed = self.loss_scale.dynamic and self.loss_scale.value > 1
        tolerated = overflowed or (self.train.on_nonfinite == "skip" and self._skipped < MAX_SKIPS)
        if not decision.finite and not tolerated:
            raise NonFinite(f"step {step + 1}: the loss or a gradient is not finite. Lower --train.learning_rate")
        self.loss_scale.update(finite=decision.finite)
        if decision.finite:
            self.learner.step(factor=decision.factor, rate=decision.rate)
        else:
            self.learner.clear()
        return decision

    def _norm(self) -> float:
        """Grouped as the split run groups it (client parts, trunk), so that even the rounding is the same."""
        groups: dict[bool, list[torch.Tensor | None]] = {True: [], False: []}
        for name, parameter in self.learner.parameters.items():
            groups[self.model.owner(name, self.cut) == "trunk"].append(parameter.grad)
        return global_norm(square_sum(groups[False]), square_sum(groups[True]))

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Score every client's held-out examples."""
        self.model.eval()
        for client_id, data in enumerate(self.data):
            correct = total = label_tokens = 0
            loss_sum, predictions = 0.0, list[int]()
            for batch in data.eval_batches(self.train.eval_batch_size):
                logits_LV = self.model(batch.ids_BT.to(self.device), self._labels(batch)[0]).float().cpu()
                score = score_eval(batch, logits_LV)
                correct, total = correct + score.correct, total + score.total
                loss_sum, label_tokens = loss_sum + score.loss_sum, label_tokens + score.label_tokens
                predictions += score.predictions
            decoded = self._decoded(data) if self.config.data.decodes else Decoded()
            if self.config.data.save_predictions:
                write_predictions(self.log.path.parent, step, data, predictions, decoded.texts)
            self._patience[client_id].take(loss_sum / label_tokens if label_tokens else math.nan)
            self.log.write(
                Evaluation(
                    step=step,
                    client_id=client_id,
                    correct=correct if data.chooses else None,
                    total=total,
                    loss_sum=loss_sum,
                    label_tokens=label_tokens,
                    matched=decoded.matched,
                )
            )
        _log.info("evaluation after step %d: done", step)
        self.model.train()

    def _decoded(self, data: ClientData) -> Decoded:
        config = self.model.model.config
        model = ContinuedLM(config, lambda rows: WholeChain(self.model, rows), device=self.device)
        return decode_held_out(model, data, self.config)

    def _labels(self, batch: Batch) -> tuple[LabelPositions, torch.Tensor]:
        positions = LabelPositions(
            row_L=batch.label_rows_L.to(self.device), position_L=batch.label_positions_L.to(self.device)
        )
        return positions, batch.label_ids_L.to(self.device)


def _numbered(patience: list[Patience]) -> dict[str, float]:
    return {f"{client}/{key}": value for client, one in enumerate(patience) for key, value in one.state().items()}
