"""Bring a model in: `python tools/hf_to_megatron.py llama2 --model-path DIR_OR_HUB_NAME --out DIR`.

The folder is Hugging Face's, Meta's (consolidated.NN.pth) or Megatron-LLM's (mp_rank_TT). Training can load each as it
is; this makes a checkpoint of it, as old scripts expect.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.config import FAMILIES, UsageError, option, parse_command, run_entry


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversion from Hugging Face, Meta or Megatron-LLM."""

    family: str = option(help="Model family.", choices=tuple(FAMILIES), positional=True)
    model_path: str = option(
        help="Folder of a Hugging Face model, of Meta's weights or of a Megatron-LLM checkpoint; or a name on the hub.",
        metavar="DIR_OR_HUB_NAME",
    )
    out: str = option(help="Folder to write the checkpoint to.", metavar="DIR")
    size: int | None = option(None, "Billions of parameters the model should have; an error if it does not.")
    cache_dir: str | None = option(None, "Where models from the hub are kept.", metavar="DIR")


def main(argv: list[str]) -> None:
    """Find the model, write it, and keep its tokenizer's model where old scripts look for it."""
    (options,) = parse_command(argv, Options, prog="hf_to_megatron.py", description=(__doc__ or "").splitlines()[0])
    from megatron.checkpoint import open_checkpoint
    from megatron.checkpoint.report import Progress
    from megatron.checkpoint.reshard import Layout, reshard
    from megatron.hf.hub import model_folder

    source = model_folder(options.model_path, options.cache_dir)
    if source.resolve() == Path(options.out).resolve():
        raise UsageError("--out is --model-path; give another folder, so that the model stays as it is")
    checkpoint, out = open_checkpoint(source, family=options.family), Path(options.out)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}")
    with Progress(checkpoint.weights) as progress:
        if options.size is not None and not progress.parameters_agree_with(options.size):
            raise UsageError(
                f"--size {options.size}: {source} has {progress.parameters / 1e9:.2f} billion parameters; "
                "leave --size out or correct it"
            )
        folder = reshard(checkpoint, out, Layout(), model_name=options.family, progress=progress.advance)
    for file in checkpoint.tokenizer_files:
        if file.suffix == ".model":
            shutil.copyfile(file, out / file.name)
    print(f"{source} -> {folder}: {progress.summary()}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
