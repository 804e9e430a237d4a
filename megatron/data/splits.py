"""The train, valid and test data that the options ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron.config import DataConfig, UsageError
from megatron.data.order import split_ranges
from megatron.data.prefixes import FILES, Part
from megatron.data.stream import Samples, SampleStream

NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class DataSplit:
    """One or more datasets.

    Attributes:
        datasets: what each has for this split.
        weights: of each, in the blend to train on.
        notes: lines for the user.
    """

    datasets: list[Samples]
    weights: list[Fraction]
    notes: list[str]

    def __len__(self) -> int:
        """Samples of one pass through each dataset."""
        return sum(map(len, self.datasets))

    def blended(self, seed: int) -> SampleStream:
        """Endless samples of all datasets."""
        return SampleStream(self.datasets, self.weights, seed=seed, shuffled=True)

    def apart(self) -> dict[str, SampleStream]:
        """One pass through each dataset, by its name: the last part of its prefix where that tells them apart."""
        names = [samples.name for samples in self.datasets]
        short = [Path(name).name for name in names]
        names = short if len(set(short)) == len(short) else names
        streams = [SampleStream([samples], seed=0, shuffled=False) for samples in self.datasets]
        return dict(zip(names, streams, strict=True))


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
            UsageError: it has no samples.
        """
        split: DataSplit | None = getattr(self, name)
        if split is None:
            raise UsageError(f"there is no {name} data: {self.source}; change --split or give --{name}_data_path")
        return split


def build_splits(config: DataConfig, seed: int) -> DataSplits:
    """Open the data of `--data_path` with `--split`, or of `--{train,valid,test}_data_path`.

    `--data_impl` makes no difference: files are always memory-mapped. `seed` is that of the order of documents.

    Raises:
        UsageError: no path, a path without files, or files without enough for a split.
        ValueError: a file is damaged.
    """
    if config.data_path:
        return _divided(config, seed)
    blends = {name: config.blend(f"{name}_data_path") for name in NAMES}
    given = [f"--{name}_data_path" for name, blend in blends.items() if blend]
    if not given:
        raise UsageError("no data: give --data_path PREFIX (or --train_data_path, --valid_data_path, --test_data_path)")
    splits = {}
    for name, blend in blends.items():
        flag, parts = f"--{name}_data_path", dict[str, Part | None]()
        for prefix in blend:
            files = FILES[config.data_type](flag, prefix, config, seed)
            parts[prefix] = files.part(0, files.count, name)
            if not parts[prefix]:
                raise UsageError(f"{flag} {prefix} has nothing to predict in its {files.count:,} {files.unit}")
        splits[name] = _split(name, blend, parts)
    return DataSplits(**splits, source=f"only {', '.join(given)} given")


def _divided(config: DataConfig, seed: int) -> DataSplits:
    """The data of `--data_path`, each prefix divided by `--split`."""
    blend = config.blend("data_path")
    files = {prefix: FILES[config.data_type]("--data_path", prefix, config, seed) for prefix in blend}
    ranges = {prefix: split_ranges(config.split, one.count) for prefix, one in files.items()}
    splits = {}
    for place, name in enumerate(NAMES):
        parts = {prefix: one.part(*ranges[prefix][place], name) for prefix, one in files.items()}
        splits[name] = _split(name, blend, parts)
    counts = ", ".join(f"{one.count:,} {one.unit}" for one in files.values())
    return DataSplits(**splits, source=f"--split {config.split!r} leaves none of the {counts} for it")


def _split(name: str, blend: Mapping[str, Fraction], parts: Mapping[str, Part | None]) -> DataSplit | None:
    """What there is for a split; all of a blend must have something to train on."""
    found = {prefix: part for prefix, part in parts.items() if part}
    if not found:
        return None
    missing = [prefix for prefix in blend if prefix not in found]
    if missing and name == "train":
        raise UsageError(f"--split leaves nothing of {missing[0]} to train on; change it, or leave that prefix out")
    return DataSplit(
        datasets=[part.samples for part in found.values()],
        weights=[blend[prefix] for prefix in found],
        notes=[part.note for part in found.values() if part.note],
    )
