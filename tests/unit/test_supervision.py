"""What the end of one role means for the others."""

from __future__ import annotations

import pytest

from hpc.supervision import cause, fatal, may_return, served, worth_requeueing

CLIENTS = ["client-0", "client-1", "client-2"]
RUNNING = dict.fromkeys(["trunk-0", *CLIENTS])


def test_without_spared_clients_any_failure_is_fatal() -> None:
    assert fatal(RUNNING, [], 0) == []
    assert fatal(RUNNING | {"client-1": 137}, [], 0) == ["client-1"]
    assert fatal(RUNNING | {"client-1": 0}, [], 0) == []


def test_clients_may_fail_while_enough_are_left() -> None:
    one, two = RUNNING | {"client-1": 137}, RUNNING | {"client-1": 137, "client-2": 1}
    assert fatal(one, CLIENTS, 2) == []
    assert fatal(two, CLIENTS, 2) == ["client-1", "client-2"]
    assert fatal(two, CLIENTS, 1) == []
    assert fatal(one | {"trunk-0": 1}, CLIENTS, 2) == ["trunk-0"]


def test_served_means_that_only_spared_ones_are_left() -> None:
    assert not served(RUNNING, CLIENTS)
    assert served(RUNNING | {"trunk-0": 0}, CLIENTS)
    assert not served(RUNNING | {"trunk-0": 0}, [])


@pytest.mark.parametrize(
    ("ended", "blamed"),
    [
        ([("client-0", 1), ("trunk-0", 1)], "trunk-0"),
        ([("trunk-0", 1), ("client-0", 2)], "client-0"),
        ([("trunk-0", 1), ("client-1", 137)], "client-1"),
        ([("client-1", 1), ("client-0", 1)], "client-1"),
    ],
    ids=["the trunk knows more", "bad input comes first", "others miss who was killed", "else the first to end"],
)
def test_the_cause(ended: list[tuple[str, int]], blamed: str) -> None:
    assert cause(ended)[0] == blamed


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(137, 0, True), (1, 1, True), (1, 2, False), (0, 0, False), (None, 0, False), (2, 0, False), (75, 0, False)],
)
def test_a_client_is_started_again(code: int | None, restarts: int, again: bool) -> None:
    assert may_return(code, restarts, 2) == again


def test_an_attempt_that_the_limit_stops_at_once_is_not_repeated_for_ever() -> None:
    assert worth_requeueing(True, 10)
    assert worth_requeueing(False, 3600)  # a node was wanted for something else
    assert not worth_requeueing(False, 100)
