"""Train a language model: `torchrun --nproc_per_node N finetune.py [flags]`, or without torchrun one process.

All flags: `python finetune.py --help`, or docs/flags.md.
"""

import sys
from pathlib import Path

from megatron.config import parse_run, resolve_run, run_entry


def main(argv: list[str]) -> None:
    """Parse the flags, open the checkpoint they name, and run."""
    typed, notes = parse_run(argv, prog="finetune.py", description="Train a language model.")
    from megatron.checkpoint import open_checkpoint  # after the flags: --help needs no torch
    from megatron.training import run

    load, family = typed.get("load"), typed.get("model_name")
    checkpoint = open_checkpoint(Path(load), typed.get("load_iters"), family=family) if load else None
    config = resolve_run(typed, checkpoint.stored_options() if checkpoint else None)
    run(config, checkpoint, notes)


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
