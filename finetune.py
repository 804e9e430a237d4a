"""Train a language model: `torchrun --nproc_per_node N finetune.py [flags]`, or without torchrun one process.

All flags: `python finetune.py --help`, or docs/flags.md.
"""

import gc
import sys

from megatron.config import parse_run, run_entry


def main(argv: list[str]) -> None:
    """Parse the flags, find what they start from, and run."""
    typed, notes = parse_run(argv, prog="finetune.py", description="Train a language model.")
    gc.disable()  # imports make many objects and next to no garbage: looking for it takes a sixth of their time
    from megatron.training import open_start, run  # after the flags: --help needs no torch

    gc.enable()
    run(open_start(typed), notes)


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
