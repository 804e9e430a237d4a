"""Rows picked from a dataset while it streams; the dataset is a folder here."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import UsageError
from megatron.data import download as module
from megatron.data.download import download
from megatron.data.tables import HuggingFaceDataset

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"id": f"{'cot' if number % 3 else 'flan'}.{number}", "question": f"é {number}", "response": "\n\u2028"}
    for number in range(60)
]
ONE = pytest.mark.parametrize("dataset", ["jsonl"], indirect=True)
PICKED = [row for row in ROWS if row["id"].startswith("cot.")]


@pytest.fixture(params=["parquet", "jsonl", "saved"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> HuggingFaceDataset:
    """`ROWS` in three files, in several row groups each; or as the library saves a dataset."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    if request.param == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    for number in range(3):
        rows, path = ROWS[20 * number :][:20], folder / f"train-{number}.{request.param}"
        if request.param == "parquet":
            table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
            pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=7)
        elif request.param == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return HuggingFaceDataset(str(folder), None, None, flag="--dataset")


@pytest.fixture(autouse=True)
def frequent_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_BETWEEN_STATES", 4)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def interrupted(rows: int, dataset: HuggingFaceDataset, output: Path) -> None:
    """A download that is interrupted when it has looked at so many rows."""
    seen = iter(range(rows))

    def identity(row: dict[str, Any], number: int, name: str) -> str:
        if next(seen, None) is None:
            raise KeyboardInterrupt
        return row["id"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_identity", identity)
        with pytest.raises(KeyboardInterrupt):
            download(dataset, output, id_prefix="cot.")


def test_picks_rows(dataset: HuggingFaceDataset, tmp_path: Path) -> None:
    output = tmp_path / "new" / "rows.jsonl"
    done = download(dataset, output, id_prefix="cot.")
    assert rows_of(output) == PICKED
    assert (done.seen, done.kept, done.size) == (60, len(PICKED), output.stat().st_size)
    assert list(output.parent.iterdir()) == [output]
    with pytest.raises(UsageError, match=r"rows\.jsonl exists"):
        download(dataset, output)


@pytest.mark.parametrize("interruptions", [[1], [3, 4], [9], [24, 4, 17], [59]], ids=str)
def test_interrupted_and_resumed_equals_straight(
    interruptions: list[int], dataset: HuggingFaceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, read = tmp_path / "out" / "rows.jsonl", 0
    for rows in interruptions:
        interrupted(rows, dataset, output)
        read = (read + rows) // 4 * 4
        expected = {"rows.jsonl.partial", "rows.jsonl.partial.json"} if read else set()
        assert {path.name for path in output.parent.iterdir()} == expected
    looked_at = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "_identity", lambda row, number, name: looked_at.append(row) or row["id"])
        done = download(dataset, output, id_prefix="cot.")
    assert looked_at == ROWS[read:]
    assert (done.seen, done.kept) == (60, len(PICKED))
    download(dataset, tmp_path / "straight.jsonl", id_prefix="cot.")
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert list(output.parent.iterdir()) == [output]


@ONE
def test_limit(dataset: HuggingFaceDataset, tmp_path: Path) -> None:
    done = download(dataset, tmp_path / "rows.jsonl", id_prefix="cot.", limit=5)
    assert (done.kept, rows_of(tmp_path / "rows.jsonl")) == (5, PICKED[:5])


def damaged_state(output: Path) -> None:
    Path(f"{output}.partial.json").write_text("{")


def shortened(output: Path) -> None:
    Path(f"{output}.partial").write_bytes(b"")


@ONE
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda output: None, {"id_prefix": "flan."}, "is of a download of all rows cot."),
        (lambda output: None, {"id_prefix": "cot.", "limit": 3}, "is of a download of all rows cot."),
        (damaged_state, {"id_prefix": "cot."}, r"partial\.json is damaged: .* remove it to begin again"),
        (shortened, {"id_prefix": "cot."}, r"partial\.json is damaged: .* is shorter than"),
    ],
    ids=["other rows", "other limit", "damaged", "shortened"],
)
def test_what_cannot_go_on(
    change: Callable[[Path], None],
    options: dict[str, Any],
    message: str,
    dataset: HuggingFaceDataset,
    tmp_path: Path,
) -> None:
    output = tmp_path / "rows.jsonl"
    interrupted(10, dataset, output)
    change(output)
    with pytest.raises((UsageError, ValueError), match=message):
        download(dataset, output, **options)
    Path(f"{output}.partial.json").unlink()
    assert download(dataset, output, **options).kept == len(rows_of(output))


@ONE
def test_a_state_without_its_rows_is_forgotten(dataset: HuggingFaceDataset, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    interrupted(10, dataset, output)
    Path(f"{output}.partial").unlink()
    interrupted(2, dataset, output)
    assert {path.name for path in tmp_path.iterdir()} == {"dataset"}
    download(dataset, output, id_prefix="cot.")
    assert rows_of(output) == PICKED


@ONE
def test_nothing_to_keep(dataset: HuggingFaceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_BETWEEN_STATES", 1000)
    with pytest.raises(ValueError, match="no row whose id begins with 'x'"):
        download(dataset, tmp_path / "rows.jsonl", id_prefix="x")
    assert {path.name for path in tmp_path.iterdir()} == {"dataset"}


@ONE
def test_a_failure_says_that_it_can_go_on(
    dataset: HuggingFaceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(10, dataset, tmp_path / "rows.jsonl")

    def unreachable() -> None:
        raise ConnectionError("no way to the hub\nmore")

    monkeypatch.setattr(dataset, "open", unreachable)
    with pytest.raises(ValueError, match="cannot be read: no way to the hub; the same command goes on"):
        download(dataset, tmp_path / "rows.jsonl", id_prefix="cot.")


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    output = tmp_path / "rows.jsonl"

    def command(name: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(ROOT / "instruct" / "download_orca_cot.py"), f"--output={output}"]
        return subprocess.run([*script, f"--dataset={tmp_path / name}"], capture_output=True, text=True)

    done = command("nothing")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"download_orca_cot.py: failed: {tmp_path / 'nothing'} cannot be read: ")
    done = command("dataset")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{output}: {len(PICKED)} rows of 60, 0.0 MB\n"
    assert rows_of(output) == PICKED
