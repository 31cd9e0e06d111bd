"""A client's held-out examples through the cut model: scored by likelihood, decoded where that is asked for."""

from __future__ import annotations

import logging
import math

import torch

from hpc.client_side import ClientSide
from hpc.config import Config
from hpc.data.dataset import ClientData, score_eval
from hpc.layouts import layout_numbers
from hpc.link.kinds import Kind
from hpc.matches import Decoded, decode_held_out
from hpc.model.continued import ContinuedLM
from hpc.predictions import write_predictions
from hpc.ragged import pad
from hpc.report.events import Evaluation, EventLog
from hpc.split_chain import SplitChains

_log = logging.getLogger("hpc")


class HeldOut:
    """One client's held-out examples."""

    def __init__(self, side: ClientSide, config: Config, data: ClientData, log: EventLog) -> None:
        self._side, self._config, self._data, self._log = side, config, data, log
        self.batches = data.eval_batches(config.train.eval_batch_size)

    @torch.no_grad()
    def evaluate(self, step: int) -> float:
        """Write what came of it into the events (and the predictions' file); loss in nats per label token."""
        side = self._side
        side.shield.evaluation(step)
        for part in (side.head, side.tail):
            part.eval()
        correct = total = label_tokens = 0
        losses: list[float] = []
        predictions: list[int] = []
        for batch in self.batches:
            layout_B2 = side.head.layout_of(batch.ids_BT)
            smashed_BTD = side.shield.smashed(side.head(batch.ids_BT.to(side.device)))
            side.link.send_rows(Kind.EVAL_SMASHED, step, smashed_BTD, batch.lengths, layout=layout_numbers(layout_B2))
            reply = side.link.recv(Kind.EVAL_TRUNK_OUT, step)
            labels, _ = side.labels(batch)
            logits_LV = side.tail(pad(reply.payload, batch.lengths), labels, layout_B2).float().cpu()
            score = score_eval(batch, logits_LV)
            correct, total = correct + score.correct, total + score.total
            label_tokens += score.label_tokens
            losses.append(score.loss_sum)
            predictions += score.predictions
        decoded = self._decoded() if self._config.data.decodes else Decoded()
        for part in (side.head, side.tail):
            part.train()
        loss_sum = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        if self._config.data.save_predictions:
            write_predictions(self._log.path.parent, step, self._data, predictions, decoded.texts)
        chooses = self._data.chooses
        _log.info("evaluation after step %d: %s", step, f"{correct} of {total} right" if chooses else f"{total} texts")
        self._log.write(
            Evaluation(
                step=step,
                correct=correct if chooses else None,
                total=total,
                loss_sum=loss_sum,
                label_tokens=label_tokens,
                matched=decoded.matched,
            )
        )
        return loss_sum / label_tokens if label_tokens else math.nan

    def _decoded(self) -> Decoded:
        """Decode the answers to the held-out examples, the trunk's keys and values staying there."""
        side = self._side
        chains = SplitChains(side.head, side.tail, side.link, side.shield)
        model = ContinuedLM(side.head.model.config, chains.open, device=side.device)
        decoded = decode_held_out(model, self._data, self._config)
        chains.enough()
        return decoded
