"""The machine itself: cores, memory, limits, and how fast it seals."""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path
from typing import get_args, get_type_hints

from hpc.config import LinkConfig
from hpc.doctor.finding import Asked, Finding, ok, warn
from hpc.link.cipher import KEY_BYTES, NONCE_BYTES, make_cipher
from hpc.report.cells import count, size

LEAST_MEMORY = 2 * 2**30  # bytes: a role with PEFT and DeepSpeed loaded takes about half a GiB
LEAST_SHM = 128 * 2**20  # bytes: MPI and NCCL put their buffers there
SLOW_GB_S = 0.5  # below it, AES is done without the processor's instructions
SEALED_BYTES = 8 * 2**20


def memory(asked: Asked) -> Finding:
    """Cores that this process may use, and memory that is free."""
    total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), free_memory()
    found = f"{count(len(os.sched_getaffinity(0)), 'core')}, {size(total)} memory, {size(free)} of it free"
    if free < LEAST_MEMORY:
        return warn(found, f"a role takes about 0.5 GiB beside its weights, and there are {asked.config.world_size}")
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shared < LEAST_SHM:
        return warn(f"{found}; /dev/shm has {size(shared)}", "MPI and NCCL need more: docker run --shm-size 1g")
    return ok(found)


def free_memory() -> int:
    """Bytes that new processes can have, as far as the kernel, and the limit of this control group, say."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def limits(asked: Asked) -> Finding:
    """Open files: a trunk rank has some for each client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + 16 * asked.config.train.clients
    found = f"{soft} open files for each process (at most {hard})"
    return ok(found) if soft >= needed else warn(found, f"{asked.config.train.clients} clients: ulimit -n {needed}")


def cipher(asked: Asked) -> Finding:
    """Speed of AES-256-GCM in both libraries (GB/s, one core)."""
    speed = {name: gigabytes_a_second(name) for name in get_args(get_type_hints(LinkConfig)["cipher_library"])}
    chosen = asked.config.link.cipher_library
    found = ", ".join(f"{name} {value:.1f} GB/s" for name, value in speed.items())
    if speed[chosen] >= SLOW_GB_S:
        return ok(f"{found} (one core)")
    fastest = max(speed, key=lambda name: speed[name])
    other = (
        f"use --link.cipher_library {fastest}" if fastest != chosen else "does this processor have AES instructions?"
    )
    return warn(f"{found}: sealing would take much of a step", other)


def gigabytes_a_second(library: str) -> float:
    """The best of three: others may be using the core."""
    sealer = make_cipher(library, os.urandom(KEY_BYTES))
    plain, sealed = bytes(SEALED_BYTES), bytearray(SEALED_BYTES + sealer.overhead)
    seconds = []
    for number in range(3):
        start = time.perf_counter()
        sealer.seal_into(number.to_bytes(NONCE_BYTES, "big"), plain, b"", memoryview(sealed))
        seconds.append(time.perf_counter() - start)
    return SEALED_BYTES / min(seconds) / 1e9
