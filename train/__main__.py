"""Train on a finished dataset: ``python -m fourmill.train CONFIG --out DIR``, or under torchrun on several GPUs.

torchrun --nproc-per-node 8 -m fourmill.train configs/cc12m.yaml --out runs/4m-b
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourmill.config import load_config
from fourmill.errors import FourmillError
from fourmill.train.trainer import train


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 finished, 1 failed, 2 wrong usage or configuration, 3 stopped before the last step."""
    parser = argparse.ArgumentParser(prog="python -m fourmill.train", description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="a dataset's configuration; its `train:` section says how to train")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and metrics.jsonl")
    parser.add_argument(
        "--snapshot", help="digest of the snapshot, or its first digits, if there are several"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.steps=100"
    )
    parsed = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        config = load_config(parsed.config, parsed.set)
        result = train(config.dataset, parsed.out, config.train, _print_record, snapshot=parsed.snapshot)
    except FourmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        print(f"step {result.step}, loss {result.loss:.4f}, {result.seconds:.0f} s: {result.checkpoint}")
    return 0


def _print_record(record: dict[str, Any]) -> None:
    if "losses" in record:
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in record["losses"].items())
        print(
            f"step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['samples_per_s']:.0f} samples/s  {losses}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
