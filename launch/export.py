"""Make of a run what plain PEFT and transformers load: a PEFT folder, or with --merge a whole model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import run_main


def main(argv: list[str]) -> int:
    args = _parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for name in ("transformers", "bitsandbytes"):  # PEFT loads the latter where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from hpc.export.command import export

    said = export(
        args.run_folder,
        args.output_dir,
        client=args.client,
        checkpoint=args.checkpoint,
        merge=args.merge,
        dtype=args.dtype,
    )
    print(said)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", metavar="RUN_FOLDER", type=Path, help="a run's output folder")
    parser.add_argument("--output_dir", metavar="DIR", type=Path, required=True, help="a new or empty folder")
    parser.add_argument(
        "--client", metavar="K", type=int, help="whose head and tail (default: the first client's that is there)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="checkpoint-N",
        help="as it was at that step; needs the client's and the trunk's files in one folder",
    )
    parser.add_argument("--merge", action="store_true", help="write a whole model instead of an adapter")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the merged model's weights (default: the run's --model.dtype)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
