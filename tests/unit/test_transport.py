"""The choice of a transport, and what the loopback promises."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hpc.errors import PeerLost, ProtocolError, TamperError, TopologyError
from hpc.link.transport import choose_transport, loopback_pair, peer_words, post_bytes, recv_bytes, wait_all


@pytest.mark.parametrize(
    ("requested", "under_mpi", "distinct_gpus", "chosen"),
    [
        ("auto", True, True, "mpi"),
        ("auto", True, False, "mpi"),
        ("auto", False, True, "nccl"),
        ("auto", False, False, "gloo"),
        ("gloo", True, True, "gloo"),
        ("mpi", True, False, "mpi"),
        ("nccl", False, True, "nccl"),
    ],
)
def test_choice(requested: str, under_mpi: bool, distinct_gpus: bool, chosen: str) -> None:
    assert choose_transport(requested, under_mpi=under_mpi, distinct_gpus=distinct_gpus) == chosen


@pytest.mark.parametrize("requested", ["mpi", "nccl"])
def test_impossible_choice_names_the_flag(requested: str) -> None:
    with pytest.raises(TopologyError, match=f"--link.transport {requested}"):
        choose_transport(requested, under_mpi=False, distinct_gpus=False)


def test_nccl_without_gpu_says_so() -> None:
    from hpc.link.nccl import require_nccl

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TopologyError, match=r"--link\.transport nccl"):
        require_nccl()


def bytes_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def test_loopback_keeps_order_and_receives_posted_ahead() -> None:
    here, there = loopback_pair()
    first, second = torch.zeros(3, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    pending = [there.recv(first), there.recv(second)]
    here.send(bytes_of("abc"))
    here.send(bytes_of("def"))
    pending[1].wait(1.0)
    assert bytes(first.numpy()) == b"abc"
    assert bytes(second.numpy()) == b"def\0\0"
    pending[0].wait(0.0)


def test_silent_peer_is_lost_in_time_and_named() -> None:
    here, _ = loopback_pair()
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"server: silent after 0.2 s of waiting for STEP"):
        here.recv(torch.zeros(1, dtype=torch.uint8)).wait(0.2, "STEP")
    assert 0.2 <= time.monotonic() - start < 1.0


def test_send_that_nobody_takes_is_lost() -> None:
    here, _ = loopback_pair()
    with pytest.raises(PeerLost, match="took nothing"):
        here.send(bytes_of("abc")).wait(0.05)


def test_closing_wakes_the_waiting_end_at_once() -> None:
    here, there = loopback_pair()
    timer = threading.Timer(0.1, there.close)
    timer.start()
    start = time.monotonic()
    with pytest.raises(PeerLost, match="server: closed the link"):
        here.recv(torch.zeros(1, dtype=torch.uint8)).wait(10.0)
    assert time.monotonic() - start < 5.0


def test_what_was_sent_before_closing_still_arrives() -> None:
    here, there = loopback_pair()
    here.send(bytes_of("abc"))
    here.close()
    buffer = torch.zeros(3, dtype=torch.uint8)
    there.recv(buffer).wait(1.0)
    assert bytes(buffer.numpy()) == b"abc"


def test_too_long_message_is_refused() -> None:
    here, there = loopback_pair()
    here.send(bytes_of("abcdef"))
    with pytest.raises(TamperError, match="6 bytes"):
        there.recv(torch.zeros(3, dtype=torch.uint8)).wait(1.0)


@pytest.mark.parametrize("data", [b"", b"x", bytes(5000)])
def test_bytes_travel_with_their_length(data: bytes) -> None:
    here, there = loopback_pair()
    pending = post_bytes(here, data)
    assert recv_bytes(there, limit=5000, timeout_s=5.0, what="a test") == data
    wait_all(pending, timeout_s=1.0, what="a test")


@pytest.mark.parametrize("size", [-1, 101, 2**62])
def test_announced_length_is_checked_before_allocation(size: int) -> None:
    here, there = loopback_pair()
    here.send(torch.tensor([size]).view(torch.uint8))
    with pytest.raises(ProtocolError, match=f"announces {size} bytes"):
        recv_bytes(there, limit=100, timeout_s=1.0, what="a test")


def test_peer_words_are_one_printable_line() -> None:
    assert peer_words(b"\x1b[31mred\nline\xff", 100) == "[31mred line\ufffd"
    assert peer_words("x" * 1000, 10) == "x" * 10 + "…"
