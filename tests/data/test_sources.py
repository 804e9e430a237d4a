"""Inputs: the same rows whatever they are stored as, with the right numbers, and errors that say where."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.config import PreprocessConfig, UsageError
from megatron.data.chunks import RowError, read_rows
from megatron.data.sources import find_sources

ROWS = [
    {"text": f"row {i} \u2028 ü " * (i % 7), "n": i, "chat": [{"role": "user", "content": str(i)}]} for i in range(90)
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
Writer = Callable[[Path], Path]


def write(name: str, content: bytes) -> Writer:
    def writer(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return writer


def zst(content: bytes) -> bytes:
    """In blocks of 500 bytes: a block is the least that comes out of a stream."""
    zstandard = pytest.importorskip("zstandard")
    stream, compressed = zstandard.ZstdCompressor().compressobj(), b""
    for start in range(0, len(content), 500):
        compressed += stream.compress(content[start : start + 500]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return compressed + stream.flush()


def parquet(folder: Path, rows: Any = ROWS, name: str = "rows.parquet") -> Path:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    folder.mkdir(exist_ok=True)
    writer.write_table(table, folder / name, row_group_size=40)
    return folder / name


def saved_dataset(folder: Path) -> Path:
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


def parquet_folder(folder: Path) -> Path:
    pytest.importorskip("datasets")
    return parquet(folder / "parquet").parent


def jsonl_folder(folder: Path) -> Path:
    pytest.importorskip("datasets")
    (folder / "jsonl").mkdir()
    write("rows.jsonl", JSONL)(folder / "jsonl")
    return folder / "jsonl"


FORMS: dict[str, Writer] = {
    "jsonl": write("rows.jsonl", JSONL),
    "byte order mark": write("rows.json", b"\xef\xbb\xbf" + JSONL),
    "no last line feed": write("rows", JSONL[:-1]),
    "gzip": write("rows.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + JSONL)),
    "two gzip members and zeros": write(
        "rows.gz", gzip.compress(JSONL[:1001]) + gzip.compress(JSONL[1001:]) + bytes(9)
    ),
    "zstd": lambda folder: write("rows.jsonl.zst", zst(JSONL))(folder),
    "two zstd frames": lambda folder: write("rows.zst", zst(JSONL[:1001]) + zst(JSONL[1001:]))(folder),
    "parquet": parquet,
    "saved dataset": saved_dataset,
    "saved splits": saved_splits,
    "folder of parquet": parquet_folder,
    "folder of jsonl": jsonl_folder,
}
TABLES = {"parquet", "saved dataset", "saved splits", "folder of parquet", "folder of jsonl"}
"""Those whose rows are counted from 0."""


def source_of(path: Path, **options: Any) -> Any:
    (source,) = find_sources(PreprocessConfig(input=(str(path),), output_prefix="", **options))
    return source


def read(
    source: Any, keys: list[str], rows: int = 2, size: int = 1
) -> tuple[list[int], list[Any], list[str], list[Any]]:
    numbers, values, bad, chunks = list[int](), list[Any](), list[str](), list(source.chunks(rows, size, keys))
    for chunk in chunks:
        for total, part in zip((numbers, values, bad), read_rows(chunk, keys, dict), strict=True):
            total += part
    return numbers, values, bad, chunks


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_same_in_every_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.sources.COMPRESSED_BLOCK", 100)
    source = source_of(FORMS[form](tmp_path))
    keys = ["text", "chat", "absent"]
    numbers, values, bad, chunks = read(source, keys)
    assert bad == []
    assert [{key: row[key] for key in keys if key in row} for row in values] == [
        {key: row[key] for key in keys if key in row} for row in ROWS
    ]
    assert numbers == list(range(len(ROWS))) if form in TABLES else numbers == list(range(1, len(ROWS) + 1))
    assert len(chunks) > 3
    assert source.size in (None, sum(chunk.advance for chunk in chunks))
    assert all(chunk.advance >= 0 for chunk in chunks)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_have_the_size_asked_for(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.sources.COMPRESSED_BLOCK", 100)
    source = source_of(FORMS[form](tmp_path))
    large = list(source.chunks(30, 1, ["text"]))
    assert 2 <= len(large) <= 3
    assert len(list(source.chunks(1, 1 << 20, ["text"]))) == 1


@pytest.mark.parametrize("form", ["jsonl", "gzip", "zstd", "parquet", "folder of parquet"])
def test_the_place_of_a_bad_row(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.sources.COMPRESSED_BLOCK", 100)
    path = FORMS[form](tmp_path)

    def refuse_number_70(row: Any) -> None:
        if row["n"] == 70:
            raise RowError("too much")

    found = [
        bad for chunk in source_of(path).chunks(2, 1, ["n"]) for bad in read_rows(chunk, ["n"], refuse_number_70)[2]
    ]
    assert found == [f"{path}, {'row 70' if form in TABLES else 'line 71'}: too much"]


def test_invalid_strings_of_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    values = [b"good", b"\xff", b"good", b"a\xc3"]
    offsets, data = pyarrow.array(values, pyarrow.binary()).buffers()[1:]
    strings = pyarrow.StringArray.from_buffers(len(values), offsets, data)
    path = parquet(tmp_path, pyarrow.table({"text": strings, "n": pyarrow.array(values, pyarrow.binary())}))
    numbers, _, bad, _ = read(source_of(path), ["text"], rows=4, size=100)
    assert numbers == [0, 2]
    assert bad == [
        f"{path}, row {row}: the value of key 'text' is not valid UTF-8 at byte {at}" for row, at in ((1, 0), (3, 1))
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.gz", gzip.compress(JSONL)[:-9], r"cut\.gz is cut off"),
        ("bad.gz", JSONL, r"bad\.gz is damaged before byte .*incorrect header"),
        ("sum.gz", gzip.compress(JSONL)[:-8] + bytes(8), r"sum\.gz is damaged before byte .*incorrect data check"),
        ("tail.gz", gzip.compress(JSONL) + b"tail", r"tail\.gz is damaged"),
        ("cut.zst", None, r"cut\.zst is cut off"),
        ("bad.zst", JSONL, r"bad\.zst is damaged before byte "),
        ("bad.parquet", JSONL, r"bad\.parquet cannot be read: .*Parquet magic bytes not found"),
        ("empty.parquet", b"", r"empty\.parquet cannot be read: Parquet file size is 0 bytes"),
    ],
)
def test_damaged_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip({"zst": "zstandard", "parquet": "pyarrow"}.get(name.split(".")[1], "zlib"))
    path = write(name, zst(JSONL)[:-9] if content is None else content)(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(source_of(path), ["text"])


def test_a_folder_without_data(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: .*doesn't contain any data files"):
        read(source_of(tmp_path), ["text"])


def test_splits(tmp_path: Path) -> None:
    path = saved_splits(tmp_path)
    assert read(source_of(path, hf_split="test"), ["n"])[1] == [{"n": n} for n in range(3)]
    with pytest.raises(ValueError, match=r"splits cannot be read: .*none not found"):
        read(source_of(path, hf_split="none"), ["n"])


def test_a_dataset_on_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = PreprocessConfig(input=("some/corpus",), output_prefix="", hf_split="validation", hf_subset="en")
    (source,) = find_sources(options)
    assert [row["n"] for row in read(source, ["n"])[1]] == list(range(len(ROWS)))
    assert asked == [(("some/corpus", "en"), {"split": "validation", "streaming": True})]


@pytest.mark.parametrize(
    ("name", "package"),
    [("x.zst", "zstandard"), ("x.parquet", "pyarrow"), ("", "datasets")],
)
def test_a_missing_package_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.zst").touch()
    (tmp_path / "x.parquet").touch()
    monkeypatch.setattr("megatron.data.tables.find_spec", lambda package: None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UsageError, match=f"{package}, which reads it, is not installed: pip install {package}"):
        source_of(tmp_path / name)


def test_zstd_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decompressor stands in for a Python that has it."""
    zstandard = pytest.importorskip("zstandard")
    windows = []

    def decompressor(options: dict[str, int]) -> Any:
        windows.append(options)
        return zstandard.ZstdDecompressor().decompressobj()

    names = {"window_log_max": "window_log_max"}
    module = SimpleNamespace(
        ZstdDecompressor=decompressor, ZstdError=zstandard.ZstdError, DecompressionParameter=SimpleNamespace(**names)
    )
    monkeypatch.setitem(sys.modules, "compression", SimpleNamespace(zstd=module))
    assert len(read(source_of(FORMS["zstd"](tmp_path)), ["text"])[1]) == len(ROWS)
    assert windows == [{"window_log_max": 31}]


def test_old_versions_of_datasets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("datasets"), "__version__", "3.6.0")
    with pytest.raises(UsageError, match=r"datasets, 3\.6\.0, may run code"):
        read(source_of(tmp_path), ["text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": ("no-such-file",)}, "--input no-such-file: no such file; --hf_split SPLIT makes it the name of"),
        ({"hf_split": "train"}, "--hf_split is for Hugging Face datasets, but every --input is a file"),
        ({"hf_subset": "en"}, "--hf_subset is for Hugging Face datasets, but every --input is a file"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_sources(PreprocessConfig(**{"input": (__file__,), "output_prefix": "", **options}))
