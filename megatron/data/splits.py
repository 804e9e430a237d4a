"""The train, valid and test data that the options ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.config import DataConfig, UsageError
from megatron.data.indexed import Array, data_files
from megatron.data.instruction import InstructionDataset, role_prefix, text_prefix
from megatron.data.order import split_ranges

NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class DataSplit:
    """Rows of a dataset: `indices` int64, rising; `dropped` further ones of the split are too long."""

    dataset: InstructionDataset
    indices: Array
    dropped: int = 0


@dataclass(frozen=True)
class DataSplits:
    """Data of the three splits, None where there is none; `source` says by which flags, for messages."""

    train: DataSplit | None
    valid: DataSplit | None
    test: DataSplit | None
    source: str

    def require(self, name: str) -> DataSplit:
        """The split `name` (train, valid, test).

        Raises:
            UsageError: it has no rows.
        """
        split: DataSplit | None = getattr(self, name)
        if split is None:
            raise UsageError(f"there is no {name} data: {self.source}; change --split or give --{name}_data_path")
        return split


def build_instruction_splits(config: DataConfig) -> DataSplits:
    """Open the instruction data of `--data_path` with `--split`, or of `--{train,valid,test}_data_path`.

    `--data_impl` makes no difference: files are always memory-mapped.

    Raises:
        UsageError: no path, several for one split, a path without files, or no row that is short enough.
        ValueError: a file is damaged.
    """
    separate = {name: getattr(config, f"{name}_data_path") for name in NAMES}
    given = [f"--{name}_data_path" for name, paths in separate.items() if paths]
    if config.data_path:
        return _shared(config, config.data_path)
    if not given:
        raise UsageError("no data: give --data_path PREFIX (or --train_data_path, --valid_data_path, --test_data_path)")
    splits = {}
    for name, paths in separate.items():
        dataset = _open(f"--{name}_data_path", paths, config) if paths else None
        splits[name] = _split(name, dataset, 0, len(dataset), config) if dataset else None
    return DataSplits(**splits, source=f"only {', '.join(given)} given")


def _shared(config: DataConfig, paths: Sequence[str]) -> DataSplits:
    dataset = _open("--data_path", paths, config)
    splits = {
        name: _split(name, dataset, start, stop, config) if stop > start else None
        for name, (start, stop) in zip(NAMES, split_ranges(config.split, len(dataset)), strict=True)
    }
    return DataSplits(**splits, source=f"--split {config.split!r} leaves none of the {len(dataset):,} rows for it")


def _split(name: str, dataset: InstructionDataset, start: int, stop: int, config: DataConfig) -> DataSplit:
    """Rows `start .. stop`, with `--drop_long_samples` without those that would be cut off."""
    indices = np.arange(start, stop, dtype=np.int64)
    if config.drop_long_samples:
        assert config.seq_length
        indices = indices[dataset.lengths[start:stop] <= config.seq_length + 1]
        if not len(indices):
            raise UsageError(
                f"--drop_long_samples leaves no {name} rows: all {stop - start:,} are longer than --seq_length "
                f"{config.seq_length}; raise it"
            )
    return DataSplit(dataset, indices, dropped=stop - start - len(indices))


def _open(flag: str, paths: Sequence[str], config: DataConfig) -> InstructionDataset:
    if len(paths) != 1:
        raise UsageError(f"{flag} takes one prefix for instruction data; blends of several are not available yet")
    prefix = paths[0]
    files = [file for half in (text_prefix(prefix), role_prefix(prefix)) for file in data_files(half)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UsageError(
            f"{flag} {prefix}: no such file: {', '.join(missing)}; the flag takes the prefix that "
            "preprocess_instruct_data.py was given as --output_prefix, without -text"
        )
    return InstructionDataset(prefix, warmup=config.mmap_warmup)
