"""Compare a layout with one device: `torchrun --nproc_per_node N tools/verify_layout.py [flags of finetune.py]`.

Takes a minute, needs no data. Exit code 0: training is the same; 1: it is not, and why; 2: wrong flags.
"""

import sys
from pathlib import Path

from megatron.config import parse_run, resolve_run, run_entry
from megatron.config.entry import FAILED


def main(argv: list[str]) -> None:
    """Parse the flags, open the checkpoint they name, and verify."""
    typed, _ = parse_run(argv, prog="verify_layout.py", description=(__doc__ or "").splitlines()[0])
    from megatron.checkpoint import open_checkpoint  # after the flags: --help needs no torch
    from megatron.verification import verified_flags, verify

    checkpoint = open_checkpoint(Path(typed["load"]), typed.get("load_iters")) if typed.get("load") else None
    config = resolve_run(verified_flags(typed), checkpoint.stored_options() if checkpoint else None)
    if not verify(config):
        sys.exit(FAILED)


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
