"""What a frame is. On its own, since schedules speak of kinds and load no torch."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """The number is the code on the wire: append only."""

    SMASHED = 1
    TRUNK_OUT = 2
    GRAD_TRUNK_OUT = 3
    GRAD_SMASHED = 4
    PART_GRADS = 5
    STEP = 6
    HANDOVER = 7
    PEER_KEY = 8
    EVAL_SMASHED = 9
    EVAL_TRUNK_OUT = 10
    READY = 11
    ALIVE = 12
    BYE = 13
    ERROR = 14
    ROWS = 15  # which examples a batch consists of, for the server's cache
    PARTS = 16  # client parts, to be averaged
    AVERAGE = 17
    MASKED = 18  # secure aggregation, in this order
    ROSTER = 19
    ATTEST = 20
    TAGS = 21
    REVEAL = 22
    VOTE = 23  # early stopping
    VERDICT = 24
    DECODE = 25  # generation: hidden states of new columns; micro is the client's number for these rows
    DECODED = 26
    REORDER = 27  # beam search: which row goes on from which
    FORGET = 28  # the rows are finished
    ENOUGH = 29  # this client generates nothing more for now
    TRUNK_ADAPTER = 30  # at the end of a run: the names, then tensor by tensor
    PAUSE = 31  # the run was asked to stop: write a checkpoint after `step` steps, and end
    WELCOME = 32  # a client comes back: every client's number of examples; micro is who, its key follows
