"""Export a checkpoint to Hugging Face: `python tools/megatron_to_hf.py --input_dir DIR --output_dir DIR`.

Takes a checkpoint of any layout. The export is opened again with `transformers`, and its logits are compared with ours,
before it gets its name.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.config import UsageError, option, parse_command, run_entry


@dataclass(frozen=True, kw_only=True)
class Options:
    """Export to Hugging Face."""

    input_dir: str = option(help="Checkpoint of any layout.", metavar="DIR")
    output_dir: str = option(help="Folder to write; an earlier export there is replaced.", metavar="DIR")
    dtype: str = option(
        "auto", "auto: the precision of the training run.", choices=("auto", "float32", "bfloat16", "float16")
    )
    num_output_shards: int | None = option(None, "Number of weight files; by default one for each 5 GB.")
    vocab_extra_ids_list: str | None = option(
        None, "Special tokens of the exported tokenizer, comma separated; those it does not have get the next ids."
    )
    override_special_tokens: tuple[str, ...] = option(
        (), "NAME=TOKEN ...: the exported tokenizer's bos, eos, pad, cls, mask, sep or unk.", metavar="NAME=TOKEN"
    )
    load_iters: int | None = option(None, "Iteration to export; by default the newest.")
    verify: bool = option(True, "Do not compare the export with the checkpoint.")


def main(argv: list[str]) -> None:
    """Open, export, compare, publish."""
    (options,) = parse_command(argv, Options, prog="megatron_to_hf.py", description=(__doc__ or "").splitlines()[0])
    from megatron.checkpoint import open_checkpoint
    from megatron.checkpoint.export import DTYPES, TOLERANCE, TokenChanges, export, logits_difference, publish
    from megatron.checkpoint.report import Progress

    source, output = Path(options.input_dir), Path(options.output_dir)
    if output.resolve() == source.resolve():
        raise UsageError("--output_dir is --input_dir; give another folder")
    changes = TokenChanges.from_words(options.vocab_extra_ids_list, options.override_special_tokens)
    checkpoint = open_checkpoint(source, options.load_iters, reads_all=True)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}")
    with Progress(checkpoint.weights, DTYPES.get(options.dtype)) as progress:
        dtype = DTYPES.get(options.dtype)
        folder = export(checkpoint, output, dtype, options.num_output_shards, progress.advance, changes)
    if options.verify:
        difference = logits_difference(checkpoint, folder)
        print(f"largest difference of logits to transformers: {difference:.1e}")
        if not difference <= TOLERANCE:
            raise ValueError(f"the export computes something else (more than {TOLERANCE}); it is left in {folder}")
    publish(folder, output)
    print(f"{checkpoint.folder} -> {output}: {progress.summary()}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
