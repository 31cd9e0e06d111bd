"""Continue prompts through the cut model: the embedding, the first and the last blocks here, the trunk elsewhere.

`python launch/generate.py --prompt TEXT` starts the trunk itself, on this machine. `torchrun --nproc-per-node N
launch/generate.py` (or srun, mpirun) makes rank 0 the trunk and the others clients, who may ask at the same time.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import make_parser, parse, run_main
from hpc.config import Config
from hpc.errors import ConfigError
from hpc.link.identity import ensure_local
from hpc.preflight import check_model
from hpc.topology import Place, World, read_world
from hpc.wishes import Wishes, prompts_of, require_prompts


def main(argv: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: OpenMP reads it once
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the trunk that this starts does not outlive it
    config, wishes, given = read(argv)
    world = read_world(os.environ)
    clients = list(range(world.world_size - 1)) if world.world_size > 1 else [wishes.client]
    if max(clients) >= config.train.clients:
        config = _with_clients(config, max(clients) + 1, wishes)
    require_prompts(given, wishes)
    if world.global_rank > 0 or world.world_size == 1:
        me = world.global_rank - 1 if world.world_size > 1 else wishes.client
        prompts = prompts_of(given, wishes, me)
    check_model(config)
    ensure_local(Path(config.link.keys_dir), config.train.clients)
    from hpc.ask import answer, rows_of
    from hpc.generate import asking, for_generation, serve, split_model

    if world.global_rank > 0 or world.world_size == 1:
        encoded = rows_of(config, prompts, wishes)  # a prompt that cannot be stops before a trunk is started
    if world.world_size == 1:
        with split_model(config, client=wishes.client, trained=wishes.run_folder, wanted=wishes.source) as model:
            answer(model, encoded, wishes)
    elif world.global_rank == 0:
        serve(for_generation(config), _place("trunk", 0, world), clients, wishes.run_folder, wishes.source)
    else:
        with asking(for_generation(config), _place("client", me, world), wishes.run_folder, wishes.source) as model:
            answer(model, encoded, wishes)
    return 0


def read(argv: list[str]) -> tuple[Config, Wishes, list[str] | None]:
    """A run's own configuration comes first, so that flags can still change it."""
    parser = make_parser(str(__doc__))
    parser.add_argument("--prompt", nargs="+", type=str, help="Texts to continue.")
    parser.add_class_arguments(Wishes)
    config, namespace = parse(parser, argv)
    wishes = Wishes(**{name: namespace[name] for name in Wishes.__dataclass_fields__})
    if wishes.run_folder is not None:
        file = Path(wishes.run_folder) / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"--run_folder {wishes.run_folder} holds no config.yaml: not a run's output folder")
        config, _ = parse(parser, ["--config", str(file), *argv])
    return config, wishes, namespace["prompt"]


def _with_clients(config: Config, clients: int, wishes: Wishes) -> Config:
    if wishes.run_folder is not None:
        raise ConfigError(
            f"client {clients - 1} asks, but the run had {config.train.clients} clients; start fewer, or choose another"
        )
    return replace(config, train=replace(config.train, clients=clients))


def _place(role: str, index: int, world: World) -> Place:
    return Place(role=role, index=index, world=world)  # type: ignore[arg-type]


if __name__ == "__main__":
    run_main(main)
