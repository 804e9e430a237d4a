"""Several indexed datasets, one behind the other, as one."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron.config import UsageError
from megatron.data.indexed import IndexedDataset, IndexedWriter, data_files, publish_datasets, tokenizer_file
from megatron.data.instruction import InstructionDataset, role_prefix, text_prefix
from megatron.tokenizer import read_description
from megatron.tokenizer.description import difference_of_descriptions

PLAIN = ("",)
INSTRUCTION = (text_prefix(""), role_prefix(""))
"""Kind of data: what stands behind its prefix in the names of its files."""


@dataclass(frozen=True, kw_only=True)
class MergeSummary:
    """What a run of `merge_datasets` did.

    Attributes:
        prefixes: the datasets merged, in order.
        sequences: how many they have.
        tokens: in these.
        seconds: time taken.
        undescribed: those of them that do not say by which tokenizer they were made; then the output does not, either.
    """

    prefixes: Sequence[str]
    sequences: int
    tokens: int
    seconds: float
    undescribed: Sequence[str]

    def notes(self) -> list[str]:
        """What the user should look at."""
        missing = [str(tokenizer_file(prefix)) for prefix in self.undescribed]
        return [f"warning: the output does not say by which tokenizer: there is no {missing[0]}"] if missing else []

    def __str__(self) -> str:
        return (
            f"{len(self.prefixes):,} datasets, {self.sequences:,} sequences, {self.tokens:,} tokens, "
            f"{self.seconds:.1f} seconds"
        )


def merge_datasets(inputs: Sequence[str], output_prefix: str) -> MergeSummary:
    """Write the datasets that `inputs` mean one behind the other, as one, to `output_prefix`.

    An input is a prefix, as training names it, or a folder, which means all datasets in it in the order of their names.
    The output is what preprocessing all of the rows at once would have written. It appears when all of it is written.

    Raises:
        UsageError: an input means nothing, they are of different kinds, or the output would be among them.
        ValueError: an input is damaged, or they have different element types, documents or tokenizers.
        OSError: a file cannot be read or written.
    """
    began = time.perf_counter()
    kind, prefixes = _find(inputs)
    _refuse_overlap(inputs, prefixes, output_prefix)
    datasets = [_open(kind, prefix) for prefix in prefixes]
    _check_alike(datasets)
    tokenizer = _common_tokenizer(prefixes)
    undescribed = [prefix for prefix in prefixes if not tokenizer_file(prefix).is_file()]
    Path(output_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    writers = _write(datasets, output_prefix)
    tokenizer_file(output_prefix).unlink(missing_ok=True)
    publish_datasets(writers, {tokenizer_file(output_prefix): tokenizer} if tokenizer and not undescribed else {})
    return MergeSummary(
        prefixes=prefixes,
        sequences=len(writers[0]),
        tokens=sum(int(halves[kind[0]].sizes.sum(dtype="i8")) for halves in datasets),
        seconds=time.perf_counter() - began,
        undescribed=undescribed,
    )


def _find(inputs: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The kind of the datasets that `inputs` mean, and their prefixes."""
    found: dict[tuple[str, ...], list[str]] = {PLAIN: [], INSTRUCTION: []}
    for name in inputs:
        stems = _stems(name)
        if not stems:
            raise UsageError(f"--input {name}: neither a folder with indexed datasets nor the prefix of one")
        halves = [stem for stem in stems if stem.endswith(INSTRUCTION)]
        found[PLAIN] += [stem for stem in stems if stem not in halves]
        found[INSTRUCTION] += dict.fromkeys(stem[: -len(INSTRUCTION[0])] for stem in halves)
    if all(found.values()):
        plain, instruction = (prefixes[0] for prefixes in found.values())
        raise UsageError(f"--input: {instruction} is instruction data, but {plain} is not; merge each kind apart")
    return next((kind, prefixes) for kind, prefixes in found.items() if prefixes)


def _stems(name: str) -> list[str]:
    """What `name` means: names of files without .bin and .idx, in the order of the names."""
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).iterdir() if path.suffix in (".bin", ".idx"))
    else:
        files = [path for half in (*PLAIN, *INSTRUCTION) for path in data_files(name + half) if path.exists()]
    return list(dict.fromkeys(str(path.with_suffix("")) for path in files))


def _refuse_overlap(inputs: Sequence[str], prefixes: Sequence[str], output_prefix: str) -> None:
    output = Path(output_prefix).resolve()
    folder = next((name for name in inputs if Path(name).resolve() == output.parent), None)
    if folder is not None:
        raise UsageError(
            f"--output_prefix {output_prefix} is in the folder --input {folder}: the next run would merge it as "
            "well; write to another one"
        )
    if output in {Path(prefix).resolve() for prefix in prefixes}:
        raise UsageError(f"--output_prefix {output_prefix} is one of the inputs; write to another one")


def _open(kind: tuple[str, ...], prefix: str) -> dict[str, IndexedDataset]:
    """What stands behind the prefix -> the files."""
    if kind == PLAIN:
        return {"": IndexedDataset(prefix)}
    rows = InstructionDataset(prefix)
    return dict(zip(INSTRUCTION, (rows.text, rows.role), strict=True))


def _check_alike(datasets: Sequence[Mapping[str, IndexedDataset]]) -> None:
    """Raise `ValueError` unless all have the element types, and documents in the way, of the first."""
    for halves in datasets:
        for half, dataset in halves.items():
            first = datasets[0][half]
            if dataset.dtype != first.dtype:
                raise ValueError(
                    f"{dataset.idx_path} has elements of type {dataset.dtype}, but {first.idx_path} of {first.dtype}: "
                    "their vocabularies differ in size"
                )
            if _is_divided(dataset) != _is_divided(first):
                whole, divided = (first, dataset) if _is_divided(dataset) else (dataset, first)
                raise ValueError(
                    f"the documents of {whole.idx_path} do not end where it ends, as in {divided.idx_path}: "
                    "make both with or both without --reference_doc_idx"
                )


def _is_divided(dataset: IndexedDataset) -> bool:
    """Whether doc_idx divides all of the dataset into documents."""
    return int(dataset.doc_idx[-1]) == len(dataset)


def _common_tokenizer(prefixes: Sequence[str]) -> bytes | None:
    """The description of the tokenizer that beside each of the datasets, where it is there, is the same."""
    files = [file for file in map(tokenizer_file, prefixes) if file.is_file()]
    descriptions = [read_description(file.parent, file.name) for file in files]
    for file, description in zip(files, descriptions, strict=True):
        if description != descriptions[0]:
            change = difference_of_descriptions(descriptions[0], description) or "their descriptions differ"
            raise ValueError(f"the tokenizer of {file} is not that of {files[0]}: {change}")
    return files[0].read_bytes() if files else None


def _write(datasets: Sequence[Mapping[str, IndexedDataset]], output_prefix: str) -> list[IndexedWriter]:
    """Copy the datasets; the writers are yet to be published."""
    total = sum(dataset.bin_path.stat().st_size for halves in datasets for dataset in halves.values())
    writers: list[IndexedWriter] = []
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=not sys.stderr.isatty()) as bar:
            for half, first in datasets[0].items():
                writers.append(IndexedWriter(output_prefix + half, first.dtype))
                for halves in datasets:
                    writers[-1].copy(halves[half], bar.update)
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    return writers
