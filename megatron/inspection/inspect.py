"""From what a run was asked for to reports of its data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.config import DataConfig, ModelConfig, ParallelConfig, TokenizerConfig, TrainingConfig, UsageError, build
from megatron.data import RowOptions
from megatron.data.packing import least_micro_batches
from megatron.inspection.figures import Limit, count
from megatron.inspection.layouts import Batching, lay_out
from megatron.inspection.report import Report
from megatron.inspection.samples import choose, read_sample
from megatron.inspection.token_files import open_token_files
from megatron.inspection.views import open_view
from megatron.inspection.vocabulary import find_vocabulary
from megatron.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is shown token by token: `numbers`, else `count` of all; of each at most `most_tokens`."""

    count: int = 0
    numbers: tuple[int, ...] = ()
    most_tokens: int = 1000


def inspect_run(typed: Mapping[str, Any], ranks: int, selection: Selection) -> Iterator[Report]:
    """Look at the data that a run names, as it would take them on `ranks` data-parallel ranks.

    `typed` are the run's flags by field name, as many as there are; without a `--data_type` the files tell it.

    Raises:
        UsageError: there is no such data, sample or tokenizer.
        ValueError: a file is damaged, there are no rows, or tokens and roles are not of the same rows.
    """
    groups = (DataConfig, TokenizerConfig, TrainingConfig, ParallelConfig, ModelConfig)
    data, named, training, parallel, model = build(groups, typed)
    if not data.prefixes():
        raise UsageError("--data_path is missing: the prefix of the data to look at")
    data = replace(data, seq_length=data.seq_length or model.max_position_embeddings)
    tokenizer = build_tokenizer(named) if named.tokenizer_type else None
    batching = _batching(data, training, parallel, ranks)
    for prefix in data.prefixes():
        yield _inspect(prefix, typed.get("data_type"), tokenizer, data, batching, selection)


def _inspect(
    prefix: str,
    data_type: str | None,
    tokenizer: Tokenizer | None,
    data: DataConfig,
    batching: Batching | None,
    selection: Selection,
) -> Report:
    files = open_token_files(prefix, data_type)
    vocabulary = find_vocabulary(prefix, tokenizer)
    limit = Limit(data.seq_length, data.drop_long_samples) if files.roles else Limit()
    view = open_view(files, data, limit)
    numbers = choose(view, selection.count, selection.numbers)
    packed = batching if files.roles else None  # all samples of plain text are of one length
    return Report(
        files=files,
        vocabulary=vocabulary,
        limit=limit,
        view=view,
        figures=count(files, vocabulary, limit),
        batching=packed,
        layouts=lay_out(files.lengths, limit, packed) if packed else [],
        samples=[read_sample(view, number, vocabulary, selection.most_tokens) for number in numbers],
    )


def _batching(data: DataConfig, training: TrainingConfig, parallel: ParallelConfig, ranks: int) -> Batching | None:
    """How rows are taken; None where lengths or sizes are not given."""
    if not data.seq_length or not training.micro_batch_size:
        return None
    rows = RowOptions(
        micro_batch_size=training.micro_batch_size,
        seq_length=data.seq_length,
        row_multiple=parallel.tensor_model_parallel_size,
        least_micro_batches=least_micro_batches(parallel.pipeline_model_parallel_size),
    )
    return Batching(rows, training.global_batch_size or training.micro_batch_size * ranks, ranks, training.seed)
