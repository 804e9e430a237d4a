"""The data that options ask for: splits, separate paths, blends, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest

from megatron.config import DataConfig, UsageError
from megatron.data import DataSplits, IndexedWriter, build_splits


def write_instructions(prefix: Path, lengths: list[int]) -> None:
    for half, dtype in (("text", "<i4"), ("role", "<u2")):
        with IndexedWriter(f"{prefix}-{half}", dtype) as writer:
            for length in lengths:
                writer.append(np.full(length, 2, dtype))


def write_text(prefix: Path, lengths: list[int]) -> None:
    with IndexedWriter(prefix, "<u2") as writer:
        for length in lengths:
            writer.append(np.arange(length, dtype="<u2"))


WRITE = {"instruction": write_instructions, "gpt": write_text}


def build(data_type: str = "instruction", **options: object) -> DataSplits:
    words = {name: tuple(str(value).split()) if name.endswith("path") else value for name, value in options.items()}
    return build_splits(DataConfig(data_type=data_type, **({"seq_length": 4} | words)), seed=1)  # type: ignore[arg-type]


def lengths(splits: DataSplits, name: str) -> list[list[int]]:
    """Tokens of all samples of each dataset."""
    return [data.lengths(np.arange(len(data))).tolist() for data in splits.require(name).datasets]


@pytest.mark.parametrize(
    ("data_type", "train", "valid", "unit"),
    [("instruction", [5] * 90, [5] * 10, "rows"), ("gpt", [5] * 112 + [2], [5] * 12 + [2], "documents")],
)
def test_splits_of_one_path(tmp_path: Path, data_type: str, train: list[int], valid: list[int], unit: str) -> None:
    WRITE[data_type](tmp_path / "all", [5] * 100)
    splits = build(data_type, data_path=tmp_path / "all", split="90,10,0")
    assert lengths(splits, "train") == [train]
    assert lengths(splits, "valid") == [valid]
    assert splits.test is None
    with pytest.raises(UsageError, match=f"no test data: --split '90,10,0' leaves none of the 100 {unit}"):
        splits.require("test")


def test_splits_of_a_blend(tmp_path: Path) -> None:
    write_instructions(tmp_path / "a", [3] * 10)
    write_instructions(tmp_path / "b", [4] * 20)
    splits = build(data_path=f"3 {tmp_path / 'a'} 1 {tmp_path / 'b'}", split="90,10")
    assert lengths(splits, "train") == [[3] * 9, [4] * 18]
    assert lengths(splits, "valid") == [[3], [4] * 2]
    stream = splits.require("train").blended(seed=1)
    assert stream.choose(0, 8)[:, 0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert {name: len(one.choose(0, 99)) for name, one in splits.require("valid").apart().items()} == {"a": 1, "b": 2}


def test_datasets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_instructions(tmp_path / folder / "a", [3] * 10)
    splits = build(valid_data_path=f"1 {tmp_path / 'x' / 'a'} 1 {tmp_path / 'y' / 'a'}")
    assert list(splits.require("valid").apart()) == [f"{tmp_path / folder / 'a'}" for folder in ("x", "y")]


@pytest.mark.parametrize("data_type", ["instruction", "gpt"])
def test_separate_paths(tmp_path: Path, data_type: str) -> None:
    WRITE[data_type](tmp_path / "a", [5] * 4)
    WRITE[data_type](tmp_path / "b", [5] * 2)
    splits = build(data_type, train_data_path=tmp_path / "a", test_data_path=tmp_path / "b")
    counts = {"instruction": (4, 2), "gpt": (5, 3)}
    assert (len(splits.require("train")), len(splits.require("test"))) == counts[data_type]
    with pytest.raises(UsageError, match="no valid data: only --train_data_path, --test_data_path given"):
        splits.require("valid")


def test_long_rows_are_told(tmp_path: Path) -> None:
    write_instructions(tmp_path / "a", [3, 5, 6, 9])
    splits = build(train_data_path=tmp_path / "a")
    assert splits.require("train").notes == [
        f"2 train rows of {tmp_path / 'a'} are longer than --seq_length 4 and are cut off there"
    ]
    splits = build(train_data_path=tmp_path / "a", drop_long_samples=True)
    assert lengths(splits, "train") == [[3, 5]]
    assert splits.require("train").notes == [
        f"2 train rows of {tmp_path / 'a'} are longer than --seq_length 4 and are left out"
    ]
    with pytest.raises(UsageError, match=r"leaves no train rows of \S+a: all 4 are longer than --seq_length 1"):
        build(train_data_path=tmp_path / "a", drop_long_samples=True, seq_length=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no data: give --data_path"),
        ("a b c", "--data_path takes one prefix, or weights and prefixes in turns, not 3 values"),
        ("a b", "--data_path: 'a', before b, is not a number"),
        ("nan a 1 b", "--data_path: 'nan', before a, is not a number"),
        ("inf a", "--data_path: 'inf', before a, is not a number"),
        ("1/0 a 1 b", "--data_path: '1/0', before a, is not a number"),
        ("0 a 1 b", "--data_path: weight 0 of a is not positive"),
        ("1 a -0.5 b", "--data_path: weight -0.5 of b is not positive"),
        ("1 a 2 b 3 a", "--data_path has a twice; give it once, with the sum of the weights"),
    ],
)
def test_mistakes_in_blends(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(data_path=words)


def test_mistakes_in_paths(tmp_path: Path) -> None:
    write_instructions(tmp_path / "a", [3])
    with pytest.raises(UsageError, match="--data_path and --valid_data_path exclude"):
        build(data_path="a", valid_data_path="b")
    with pytest.raises(UsageError, match=r"--data_path \S*a: no such file: \S*a\.bin.*instruction data, .*--data_type"):
        build("gpt", data_path=tmp_path / "a")
    (tmp_path / "a-role.idx").unlink()
    with pytest.raises(UsageError, match=r"--data_path \S*a: no such file: \S*a-role\.idx; .*without -text"):
        build(data_path=tmp_path / "a")
    with pytest.raises(UsageError, match=r"no such file: \S*b\.bin, \S*b\.idx; the flag takes a prefix such as"):
        build("gpt", data_path=tmp_path / "b")
    write_text(tmp_path / "b", [3])
    with pytest.raises(UsageError, match=r"no such file: .*pretraining text, .*--data_type"):
        build(data_path=tmp_path / "b")


@pytest.mark.parametrize(
    ("documents", "is_enough"),
    [([0, 0], False), ([1, 0, 3], False), ([4], False), ([1, 1, 0, 1, 1, 1], True), ([5], True)],
)
def test_too_little_text(tmp_path: Path, documents: list[int], is_enough: bool) -> None:
    write_text(tmp_path / "a", documents)
    if is_enough:
        assert lengths(build("gpt", train_data_path=tmp_path / "a"), "train") == [[5]]
        return
    with pytest.raises(UsageError, match=r"too little text to train on: [0-9]+ tokens in [0-9]+ documents, less than"):
        build("gpt", train_data_path=tmp_path / "a")


@pytest.mark.parametrize(("documents", "is_enough"), [([], False), ([1], False), ([1, 1], True), ([3], True)])
def test_little_text_to_evaluate_on(tmp_path: Path, documents: list[int], is_enough: bool) -> None:
    """Even a part of a sample can be evaluated; a split may have less, and then has nothing."""
    write_text(tmp_path / "a", [*[5] * 9, *documents])
    splits = build("gpt", data_path=tmp_path / "a", split=f"9,{len(documents)}")
    assert (lengths(splits, "valid") == [[sum(documents)]]) if is_enough else splits.valid is None
    write_text(tmp_path / "a", documents)
    if not is_enough:
        with pytest.raises(UsageError, match=f"nothing to predict in its {len(documents)} documents"):
            build("gpt", valid_data_path=tmp_path / "a")


def test_all_of_a_blend_must_have_something_to_train_on(tmp_path: Path) -> None:
    write_instructions(tmp_path / "a", [3] * 10)
    write_instructions(tmp_path / "b", [4])
    with pytest.raises(UsageError, match=r"--split leaves nothing of \S+b to train on"):
        build(data_path=f"1 {tmp_path / 'a'} 1 {tmp_path / 'b'}", split="40,60")
