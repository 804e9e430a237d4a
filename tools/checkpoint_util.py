"""Cut a checkpoint for another layout, or merge it: `python tools/checkpoint_util.py --load_dir DIR --save_dir DIR`.

Training loads a checkpoint into any layout as it is; this writes one file for each model-parallel rank, as old scripts
expect.
"""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.config import FAMILIES, UsageError, option, parse_command, run_entry


@dataclass(frozen=True, kw_only=True)
class Options:
    """Layout and vocabulary of a checkpoint."""

    load_dir: str = option(help="Checkpoint of any layout, or a Hugging Face model folder.", metavar="DIR")
    save_dir: str = option(help="Folder to write the checkpoint to; not --load_dir.", metavar="DIR")
    target_tensor_parallel_size: int = option(1, "Ranks that will share each layer.")
    target_pipeline_parallel_size: int = option(1, "Groups of ranks that will each hold some of the layers.")
    model_type: str | None = option(
        None, "Model family, where the checkpoint does not say it.", choices=tuple(FAMILIES)
    )
    true_vocab_size: int | None = option(
        None, "Rows of the vocabulary: fewer are cut off, further ones start as the mean of the others."
    )
    bf16: bool = option(False, "Cast the weights to bf16, and leave the optimizer state out.")
    optim: bool = option(True, "Leave the optimizer state out: for weights that are only converted.")
    load_iters: int | None = option(None, "Iteration to load; by default the newest.")


def main(argv: list[str]) -> None:
    """Open, reshard, report."""
    (options,) = parse_command(argv, Options, prog="checkpoint_util.py", description=(__doc__ or "").splitlines()[0])
    import torch

    from megatron.checkpoint import open_checkpoint
    from megatron.checkpoint.report import Progress
    from megatron.checkpoint.reshard import Layout, reshard

    load, save = Path(options.load_dir), Path(options.save_dir)
    if load.resolve() == save.resolve():
        raise UsageError("--save_dir is --load_dir; give another folder, so that nothing is overwritten")
    checkpoint = open_checkpoint(load, options.load_iters, reads_all=True, family=options.model_type)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}")
    if not checkpoint.is_hugging_face and options.model_type not in (None, checkpoint.model.model_name):
        print(f"note: the checkpoint is of {checkpoint.model.model_name}; --model_type {options.model_type} is ignored")
    layout = Layout(options.target_tensor_parallel_size, options.target_pipeline_parallel_size)
    dtype = torch.bfloat16 if options.bf16 else None
    if checkpoint.optimizer and options.optim and options.bf16:
        print("note: --bf16 leaves the optimizer state out; training resumes from the original, into any layout")
    if options.bf16 or not options.optim:
        checkpoint = replace(checkpoint, optimizer=None)
    with Progress(checkpoint.weights, dtype, checkpoint.optimizer) as progress:
        folder = reshard(
            checkpoint,
            save,
            layout,
            model_name=options.model_type,
            vocab_size=options.true_vocab_size,
            dtype=dtype,
            progress=progress.advance,
        )
    for file in load.glob("tokenizer.model"):
        shutil.copyfile(file, save / file.name)
    added = (options.true_vocab_size or checkpoint.vocab_size) - checkpoint.vocab_size
    if added:
        print(f"vocabulary: {checkpoint.vocab_size} -> {options.true_vocab_size} rows ({added:+d})")
    print(f"{checkpoint.folder} -> {folder}, {layout.tensor} tensor x {layout.pipeline} pipeline: {progress.summary()}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
