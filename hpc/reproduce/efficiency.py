"""The paper's numbers on time, as a preset says: the suite `efficiency` of `hpc.bench`, with its own files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpc.bench.results import named, provenance, raw_path, render_one, save
from hpc.bench.suite import Options, load_suite
from hpc.cli import make_parser, parse
from hpc.errors import ConfigError
from hpc.reproduce.preset import Efficiency, Preset
from hpc.reproduce.run import as_flag

NAME, SCRIPT = "efficiency", "launch/reproduce.py"


def efficiency_path(results: Path, preset: Preset) -> Path:
    """Where the measurements of a preset are."""
    return raw_path(results, named(NAME, preset.name))


def measure_efficiency(
    preset: Preset, *, root: Path, results: Path, data_dir: Path, arguments: Sequence[str]
) -> list[Path]:
    """Measure now, whatever there was; returns the files written. `arguments`: the command line behind the script."""
    options = options_of(preset, root=root, results=results, data_dir=data_dir)
    measured = load_suite(NAME).measure(options)
    origin = provenance(options.config, arguments, script=SCRIPT)
    written = save(results, NAME, measured, origin, preset=preset.name)
    return [written, *render_one(results, named(NAME, preset.name))]


def options_of(preset: Preset, *, root: Path, results: Path, data_dir: Path) -> Options:
    """Raises `ConfigError` if the preset says nothing of time, or a flag is none of a run's."""
    wanted = _wanted(preset)
    flags = [text for key, value in wanted.flags.items() for text in (f"--{key}", as_flag(value))]
    task = str(wanted.flags.get("data.task", "ward_notes"))
    if task != "ward_notes":
        # A run finds its task's folder in there by itself.
        flags += ["--data.data_dir", str(data_dir), "--data.partition", "iid"]
    flags += ["--train.clients", str(wanted.clients)]
    return Options(
        config=parse(make_parser(str(__doc__)), flags)[0],
        flags=tuple(flags),
        local=root / "launch" / "local.py",
        folder=results / "runs" / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{named(NAME, preset.name)}",
        turns=wanted.turns,
        rings=wanted.rings,
    )


def list_efficiency(preset: Preset, say: Callable[[str], None] = print) -> None:
    """What would be measured, without starting anything. `options_of` says whether it could be."""
    for line in _listed(_wanted(preset)):
        say(line)


def _listed(wanted: Efficiency) -> Iterator[str]:
    from hpc.bench.efficiency import MOST_CLIENTS, SAMPLES, clients_of, in_rings, members
    from hpc.bench.namespaces import Hosts
    from hpc.bench.turn_figures import WARM_UP_TURNS

    everybody = members(wanted.clients, Hosts(tag="", cables=1))
    rings = in_rings(everybody, MOST_CLIENTS // wanted.rings)
    turns = wanted.turns + WARM_UP_TURNS
    for number, ring in enumerate(rings, start=1):
        yield f"ring {number} of {len(rings)}: {turns} turns of {SAMPLES} samples for each of"
        for member in ring:
            steps, clients = turns * member.steps_per_turn + 1, clients_of(member)
            where = ", only as root and where tc can limit a cable" if member.hosts else ""
            yield f"  {member.name}: {steps} steps of {SAMPLES // member.steps_per_turn}, clients: {clients}{where}"


def _wanted(preset: Preset) -> Efficiency:
    if preset.efficiency is None:
        raise ConfigError(f"--preset {preset.name} measures no time: its section `efficiency` would say how")
    return preset.efficiency
