"""What every role's process sets up first: threads, device, quiet."""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
import warnings

import torch

from hpc.config import Config
from hpc.errors import ConfigError
from hpc.last_words import LAST_WORDS
from hpc.launcher import THREADS
from hpc.logs import set_up
from hpc.quantizer import leave_out_unless
from hpc.quiet import hush
from hpc.topology import Place
from hpc.undumped import hide_memory

log = logging.getLogger("hpc")


def prepare_process(config: Config, place: Place) -> None:
    """Threads, device, log, and quiet: only trunk rank 0 talks unless something is wrong. Its memory is its own."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--run.device cuda: this torch sees no GPU; use --run.device cpu or auto")
    torch.set_num_threads(config.run.threads or int(os.environ.get(THREADS, len(os.sched_getaffinity(0)))))
    device = device_of(config, place)
    if place.role in ("trunk", "client"):
        hide_memory(shares_memory=place.world.launcher == "mpi" or device.type == "cuda")
    # DeepSpeed takes its device from here; ranks may share one, or see only their own.
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else place.world.local_rank)
    if place.role == "trunk":  # its whole world is the trunk; ZeRO 3 refuses a group that is smaller than this says
        os.environ["WORLD_SIZE"] = str(config.trunk.ranks)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(device)
    set_up(place.name, mixed=LAST_WORDS not in os.environ and place.world.world_size > 1)
    hush()
    log.info("%s", about_process(device))
    leave_out_unless(config.trunk.quantization)
    warnings.filterwarnings("ignore", category=FutureWarning)


def about_process(device: torch.device) -> str:
    """What a log begins with: which process this is, and on what."""
    return (
        f"started: pid {os.getpid()} on {socket.gethostname()}, clock UTC{time.strftime('%z')}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads"
    )


def device_of(config: Config, place: Place) -> torch.device:
    """The GPU of this rank where there is one (shared if there are fewer than ranks), else the CPU."""
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", place.world.local_rank % max(1, torch.cuda.device_count()))
