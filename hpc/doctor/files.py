"""Keys, the output folder, its clock, and the model's files."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hpc.doctor.finding import Asked, Finding, fail, ok, warn
from hpc.link.identity import SERVER, Authorised, fingerprint, load_private, load_server_public, short
from hpc.report.cells import count, size

LEAST_SPACE = 2**30  # bytes
CLOCK_S = 2.0
RUNS = "results/runs"
NETWORKED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse", "9p", "afs", "panfs", "wekafs")


def keys(asked: Asked) -> Finding:
    """Every private key of the folder as a run would load it; the server's pinned key; how many clients may log in."""
    folder, clients = Path(asked.config.link.keys_dir), asked.config.train.clients
    if not folder.is_dir():
        cure = f"launch/local.py makes them; on several hosts: python launch/keys.py make --keys_dir {folder}"
        return warn(f"{folder} is not there yet", cure)
    private = [load_private(folder, path.stem).name for path in sorted(folder.glob("*.key"))]  # raises with the cure
    pinned = folder / f"{SERVER}.pem"
    if not pinned.exists():
        return fail(f"{pinned} is missing, so no client knows the server", "copy the server's server.pem there")
    allowed = len(Authorised.load(folder).by_client_id())
    found = (
        f"{folder}: private {', '.join(private) or 'none'}; server {short(fingerprint(load_server_public(folder)))}; "
        f"{count(allowed, 'client')} authorised"
    )
    if stat.S_IMODE(folder.stat().st_mode) & 0o022:
        return warn(f"{found}; others can write in it", f"chmod 700 {folder}")
    if SERVER in private and allowed < clients:
        return warn(f"{found}, of {clients}", "python launch/keys.py authorise FILE, for each client's public key")
    return ok(found)


def output(asked: Asked) -> Finding:
    """The run's folder, or the nearest that exists: a file can be written, synced and read back; room; its kind."""
    wanted = asked.config.run.folder or RUNS
    nearest = existing(Path(wanted))
    if not nearest.is_dir():
        return fail(f"{nearest} is a file", "give a folder as --run.output_dir")
    try:
        with draft(nearest) as path:
            data = os.urandom(4096)
            _write(path, data)
            same = path.read_bytes() == data
    except OSError as error:
        return fail(f"{nearest} cannot be written ({error.strerror})", "choose another --run.output_dir")
    if not same:
        return fail(f"{nearest} gives back other bytes than were written", "use another file system")
    free, kind = shutil.disk_usage(nearest).free, file_system(nearest)
    found = f"{wanted}: {size(free)} free on {kind}"
    if free < LEAST_SPACE:
        return warn(found, "checkpoints may not fit: make room, or set --train.save_total_limit")
    local = not kind.startswith(NETWORKED)
    return ok(f"{found}, this host's own (roles on other hosts write to theirs)" if local else found)


def clock(asked: Asked) -> Finding:
    """This host's clock against the one that stamps files in the output folder: on a network, the file server's."""
    with draft(existing(Path(asked.config.run.folder or RUNS))) as path:
        before = time.time()
        _write(path, b"now")
        after = time.time()
        stamp = path.stat().st_mtime
    offset = max(before - stamp, stamp - after, 0.0)
    found = f"{offset:.1f} s apart from the output folder's time stamps"
    if offset <= CLOCK_S:
        return ok(found)
    return warn(found, "log lines of several hosts will not line up (no result depends on it): set the clock by NTP")


def model(asked: Asked) -> Finding:
    """Whether the model's files are here; nothing is downloaded or converted."""
    from hpc.source.cache import cache_root
    from hpc.source.gguf_folder import gguf_of
    from hpc.source.smollm2 import FOLDER, find_gguf

    name = asked.config.model.name_or_path
    if name == "tiny-llama":
        return ok(f"{name}: random, made when needed")
    if name == "smollm2-135m":
        converted = cache_root() / FOLDER
        if converted.is_dir():
            return ok(f"{name}: {converted}")
        return ok(f"{name}: in its wheel ({size(find_gguf().stat().st_size)}); the first run converts it, in seconds")
    if (gguf := gguf_of(name)) is not None:
        return ok(f"{gguf}: {size(gguf.stat().st_size)}")
    if Path(name).is_dir():
        there = (Path(name) / "config.json").is_file()
        return ok(f"{name}: a folder") if there else fail(f"{name} has no config.json", "give a model's folder")
    if name.startswith((".", "/", "~")):
        return fail(f"{name} is not there", "mend --model.name_or_path")
    return _on_the_hub(name)


def _on_the_hub(name: str) -> Finding:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ok(f"{name}: in the hub's cache")
    cure = f"on a machine with network: hf download {name}; hosts without network need the same HF_HOME, or a folder"
    return warn(f"{name} is not in the hub's cache; each client host and each trunk host would download its part", cure)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


@contextlib.contextmanager
def draft(folder: Path) -> Iterator[Path]:
    """A new empty file in `folder`, gone afterwards. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def file_system(folder: Path) -> str:
    """Kind of the file system that `folder` lies on: the mount point that is its longest beginning."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, name, *_ = line.split()
        place = place.replace("\\040", " ")
        if folder.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, name
    return kind
