"""Download the chain-of-thought rows of OpenOrca: `python instruct/download_orca_cot.py --output FILE`.

They are picked while the dataset streams. An interrupted download goes on where it stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.config import option, parse_command, run_entry
from megatron.config.option import check_values
from megatron.data.download import download
from megatron.data.tables import HuggingFaceDataset


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Download."""

    output: str = option(help="The jsonl file to write.", metavar="FILE")
    dataset: str = option("Open-Orca/OpenOrca", "Name of the dataset on the hub, or a folder.")
    id_prefix: str = option("cot.", "Rows are kept whose id begins so.")
    limit: int | None = option(None, "Rows to keep at most; by default all.", within="[1, inf)")

    def __post_init__(self) -> None:
        check_values(self)


def main(argv: list[str]) -> None:
    """Run the command."""
    (options,) = parse_command(
        argv, DownloadOptions, prog="download_orca_cot.py", description=(__doc__ or "").splitlines()[0]
    )
    source = HuggingFaceDataset(options.dataset, None, None, flag="--dataset")
    done = download(source, Path(options.output), id_prefix=options.id_prefix, limit=options.limit)
    print(f"{options.output}: {done.kept:,} rows of {done.seen:,}, {done.size / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
