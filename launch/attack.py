"""How much of a client's text an attacker recovers from one run: scores beside their floors, with intervals.

`python launch/attack.py --attack.run_folder RUN` attacks a run that had --privacy.record_steps; with `--config FILE`
and the flags of a run instead, that run is made first, with recordings, as launch/local.py would. Method fsha takes no
run_folder: it plays a hostile server that steers the training of the victim's real client, here in this process.
Writes attack-<method>.json into the run's folder.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import make_parser, parse, run_main
from hpc.privacy.attack_config import AttackConfig


def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = make_parser(str(__doc__))
    parser.add_class_arguments(AttackConfig, "attack")
    config, namespace = parse(parser, argv)
    options: AttackConfig = parser.instantiate(namespace).attack
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run outlives the command
    from hpc.privacy.attack_command import attacked, run_flags

    result, folder = attacked(config, options, run_flags(argv), Path(__file__).with_name("local.py"))
    print(result.as_text())
    print(result.write(folder))
    return 0


if __name__ == "__main__":
    run_main(main)
