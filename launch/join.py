"""A client from outside the job: joins a run whose trunk is elsewhere, with its own identity (`--link.keys_dir`).

    python launch/join.py --host gpu03 --port 29500 --client_id 1 --config launch/recipes/tiny.yaml

Settings are the run's own; give the same `--config` and flags as there. The identity needs this client's key and
`server.pem` of the trunk's side, which in turn needs this client's public key (`launch/keys.py authorise`).

On the other side, `--run.outside_clients N` leaves the last N clients out, under any launcher; the port must be
reached from here, and MASTER_ADDR there must be an address that is:

    torchrun --nproc-per-node 2 --master-addr gpu03 --master-port 29500 \\
        launch/train.py --run.outside_clients 1 --config launch/recipes/tiny.yaml
    srun -n 2 python launch/train.py --run.outside_clients 1 --link.port 29500 --config launch/recipes/tiny.yaml
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=gpu03 MASTER_PORT=29500 python launch/train.py --run.outside_clients 1 ...

Where no port is reached but a folder is shared, give all sides `--link.rendezvous FOLDER`, and what is `--link.port`
there as `--port` here, if several runs meet in it or the other side is a Slurm job.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train

from hpc.cli import make_parser, parse, run_main, to_yaml
from hpc.joining import place_from_outside, wait_for_store
from hpc.link.identity import client_name, load_private, load_server_public


def main(argv: list[str]) -> int:
    parser = make_parser(str(__doc__))
    parser.add_argument("--host", type=str, default=None, help="Name or address of trunk rank 0's machine.")
    parser.add_argument("--port", type=int, default=None, help="Port of the run's store there.")
    parser.add_argument("--client_id", type=int, default=None, help="Which client of the run this is.")
    config, namespace = parse(parser, argv)
    where = place_from_outside(config, client_id=namespace.client_id, host=namespace.host, port=namespace.port)
    if config.link.port or namespace.port:
        # The port names the run in a shared folder, and is where its store is otherwise.
        config = replace(config, link=replace(config.link, port=namespace.port or config.link.port))
    load_private(config.link.keys_dir, client_name(where.index))  # what is missing here need not wait for the others
    load_server_public(config.link.keys_dir)
    if not config.link.rendezvous:
        wait_for_store(where.world.master_addr, where.world.master_port, config.link.timeout_s)
    return train.run_rank(config, where, to_yaml(parser, namespace))


if __name__ == "__main__":
    run_main(main)
