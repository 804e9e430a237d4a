"""Speed of the orders of pretraining: documents and samples of several epochs, built, written and opened again.

The documents are of random length; nothing but their index is read.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron.config import DataConfig, option, parse_command
from megatron.data import IndexedWriter, SampleStream, build_splits
from megatron.data.document_order import build_order
from megatron.data.indexed import IndexedDataset
from megatron.data.order import permutation
from tools.benchmark.report import ReportOptions, Table, report
from tools.benchmark.timing import seconds


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmark"""

    documents: int = option(500_000, "How many documents.")
    mean_length: int = option(500, "Their tokens on average.")
    seq_length: int = option(2048, "Inputs of a sample.")
    epochs: int = option(10, "How many epochs.")
    rounds: int = option(5, "Rounds; the figures are medians.")


def main(argv: list[str]) -> None:
    """Run the command."""
    options, output = parse_command(argv, BenchmarkOptions, ReportOptions, prog="gpt_index", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        lengths = np.random.default_rng(0).integers(1, 2 * options.mean_length, options.documents)
        with IndexedWriter(prefix, "<u2") as writer:
            writer.extend(np.zeros(int(lengths.sum()), "<u2"), lengths)
        config = DataConfig(train_data_path=(str(prefix),), seq_length=options.seq_length)

        def start(seed: int) -> SampleStream:
            """What a run does before its first batch."""
            stream = build_splits(config, seed).require("train").blended(seed)
            stream.read(stream.choose(0, 1))
            return stream

        sizes = np.array(IndexedDataset(prefix).sizes)
        samples = len(build_splits(config, 0).require("train"))

        def build(seed: int) -> None:
            """The orders of documents and of samples, in memory."""
            for epoch in range(options.epochs):
                build_order(sizes, seed, epoch)
                permutation(samples, seed, epoch)

        figures: dict[str, list[float]] = {}
        for seed in range(options.rounds):
            calls: dict[str, Callable[[], object]] = {
                "open the token file": partial(IndexedDataset, prefix),
                f"build the orders of {options.epochs} epochs": partial(build, seed),
                "start training, nothing kept": partial(start, seed),
                "start training, with what was kept": partial(start, seed),
            }
            for what, call in calls.items():
                figures.setdefault(what, []).append(seconds(call))
    rows = [{"work": what, "ms": statistics.median(found) * 1000} for what, found in figures.items()]
    report("gpt_index", options, [Table("orders of pretraining", {"work": "", "ms": ".2f"}, rows)], output)
