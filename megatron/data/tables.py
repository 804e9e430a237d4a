"""Inputs that are tables: parquet files, and datasets of Hugging Face's library, read batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.config import UsageError
from megatron.data.chunks import Chunk, Records, Row, RowError

READ_BUFFER = 1 << 20
"""Bytes of a column that are read at a time; otherwise a whole row group would be."""
OLDEST_DATASETS = 4
"""Major version; earlier ones run code that comes with a dataset."""


class ParquetFile:
    """A parquet file; only the columns that are looked at are read. Its rows are counted from 0, as tables do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size: int | None = Path(name).stat().st_size
        require("pyarrow", name)

    def chunks(self, rows: int, size: int, keys: Sequence[str]) -> Iterator[Chunk]:
        """Its rows."""
        from pyarrow.parquet import ParquetFile as Reader

        first = advanced = 0
        with errors_of(self.name), Reader(self.name, buffer_size=READ_BUFFER, pre_buffer=False) as reader:
            total, present = reader.metadata.num_rows, _present(keys, reader.schema_arrow.names)
            batches = reader.iter_batches(rows, columns=present, use_threads=False)
            for records, _ in _gathered(batches, size):
                done = (self.size or 0) * (first + len(records)) // total
                yield Records(self.name, first, done - advanced, records)
                first, advanced = first + len(records), done


class HuggingFaceDataset:
    """A dataset of Hugging Face's library, in a folder or streamed from the hub. Its rows are counted from 0.

    A folder is what `save_to_disk` wrote, or has files that `load_dataset` reads.
    """

    def __init__(self, name: str, subset: str | None, split: str | None, *, flag: str = "--input") -> None:
        self.name = name
        self.size: int | None = None
        self._subset, self._split, self._flag = subset, split, flag
        require("datasets", name, flag)

    def chunks(self, rows: int, size: int, keys: Sequence[str]) -> Iterator[Chunk]:
        """Its rows."""
        first = 0
        with errors_of(self.name):
            dataset = self.open()
            if present := _present(keys, dataset.column_names or []):
                dataset = dataset.select_columns(present)
            for records, advance in _gathered(dataset.with_format("arrow").iter(rows), size):
                yield Records(self.name, first, advance, records)
                first += len(records)

    def open(self) -> Any:
        """What the library makes of it."""
        import datasets
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # each attempt to reach the hub would be a line; what comes of them is told
        if int(datasets.__version__.split(".")[0]) < OLDEST_DATASETS:
            raise UsageError(
                f"{self._flag} {self.name}: the installed version of the package datasets, {datasets.__version__}, may "
                f"run code that comes with a dataset: pip install 'datasets>={OLDEST_DATASETS}'"
            )
        folder = Path(self.name)
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(folder / (self._split or "train"))
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(self.name, self._subset, split=self._split or "train", streaming=True)


def _present(keys: Sequence[str], columns: Sequence[str]) -> list[str] | None:
    """Those of `keys` that are columns. None stands for all columns: without any there would be no rows."""
    return [key for key in keys if key in columns] or None


def _gathered(batches: Iterable[Any], size: int) -> Iterator[tuple[list[Row | RowError], int]]:
    """Rows of Arrow's `batches`, of several where they are smaller than `size` bytes; and how many bytes they are."""
    rows: list[Row | RowError] = []
    held = 0
    for batch in batches:
        rows += _rows(batch)
        held += batch.nbytes
        if held >= size:
            yield rows, held
            rows, held = [], 0
    if rows:
        yield rows, held


def _rows(batch: Any) -> list[Row | RowError]:
    """The rows of a batch; strings that are no valid UTF-8 make their row a bad one."""
    try:
        rows: list[Row | RowError] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            return [row for index in range(batch.num_rows) for row in _rows(batch.slice(index, 1))]
        return [RowError(f"the value of key {_not_unicode(batch)!r} is not valid UTF-8 at byte {error.start}")]
    return rows


def _not_unicode(batch: Any) -> str:
    """The first column that is not valid UTF-8."""
    for key in batch.schema.names:
        try:
            batch.column(key).to_pylist()
        except UnicodeDecodeError:
            return str(key)
    raise AssertionError("all columns can be decoded")


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Let errors of the libraries say which input they are about."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # they raise many kinds, and those of pyarrow are not all ValueError or OSError
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{name} cannot be read: {reason}") from error


def require(package: str, name: str, flag: str = "--input") -> None:
    """Raise `UsageError` if the package that reads `name`, the value of `flag`, is missing."""
    if not find_spec(package):
        raise UsageError(f"{flag} {name}: {package}, which reads it, is not installed: pip install {package}")
