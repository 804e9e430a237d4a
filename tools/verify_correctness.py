"""Compare our logits with Hugging Face's: `torchrun --nproc_per_node N tools/verify_correctness.py [flags]`.

Takes finetune.py's flags, too. Exit code 0: both compute the same; 1: not, and from which layer on; 2: wrong flags.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.config import UsageError, build, option, parse_run, resolve_run, run_entry
from megatron.config.entry import FAILED
from megatron.config.option import check_values


@dataclass(frozen=True, kw_only=True)
class Options:
    """Comparison with Hugging Face."""

    huggingface_model: str | None = option(
        None, "Folder or hub name of the model to compare with; by default --load.", metavar="MODEL"
    )
    huggingface_cache: str | None = option(None, "Where models from the hub are kept.", metavar="DIR")
    huggingface_device: str | None = option(
        None, "Where it computes; by default the device of the main rank.", choices=("cpu", "cuda")
    )
    huggingface_dtype: str = option("float32", "Its precision.", choices=("float32", "bfloat16", "float16"))
    rows: int = option(8, "How many rows of --data_path, or of random tokens without it.", within="[1, inf)")
    tolerance: float | None = option(
        None, "Largest error of a logit; by default 1e-3 in fp32, 0.5 in bf16, 0.1 in fp16.", within="[0, inf)"
    )

    def __post_init__(self) -> None:
        check_values(self)


def main(argv: list[str]) -> None:
    """Parse the flags, open both models, and compare."""
    summary = (__doc__ or "").splitlines()[0]
    typed, _ = parse_run(argv, prog="verify_correctness.py", description=summary, further=[Options])
    (options,) = build([Options], typed)
    if not typed.get("load"):
        raise UsageError("--load is missing: the checkpoint, or Hugging Face folder, to compare")
    from megatron.checkpoint import open_checkpoint  # after the flags: --help needs no torch
    from megatron.verification.correctness import Theirs, compared_flags, verify_correctness

    checkpoint = open_checkpoint(Path(typed["load"]), typed.get("load_iters"), reads_all=True)
    name = options.huggingface_model or (typed["load"] if checkpoint.is_hugging_face else "")
    if not name:
        raise UsageError("--huggingface_model is missing: what to compare --load with")
    config = resolve_run(compared_flags(typed), checkpoint.stored_options())
    theirs = Theirs(name, options.huggingface_cache, options.huggingface_dtype, options.huggingface_device)
    if not verify_correctness(config, checkpoint, theirs, rows=options.rows, tolerance=options.tolerance):
        sys.exit(FAILED)


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
