"""Merge tokenized datasets: one behind the other, as if all of their rows had been tokenized at once."""

import sys
from dataclasses import dataclass

from megatron.config import interrupt_on_sigterm, option, parse_command, run_entry
from megatron.data.merge import merge_datasets


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merge."""

    input: tuple[str, ...] = option(
        help="A folder, which means all datasets in it in the order of their names, or prefixes of datasets.", nargs="+"
    )
    output_prefix: str = option(help="Prefix of the merged dataset; not in a folder of the input.")


def main(argv: list[str]) -> None:
    """Run the command."""
    interrupt_on_sigterm()
    (options,) = parse_command(argv, MergeOptions, prog="merge_datasets.py", description=__doc__)
    summary = merge_datasets(options.input, options.output_prefix)
    for note in summary.notes():
        print(note, file=sys.stderr)
    print(f"{options.output_prefix}: {summary}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
