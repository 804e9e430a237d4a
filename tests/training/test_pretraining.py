"""Whole runs on pretraining text and on blends: what is trained, resumed, evaluated and said."""

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ARCHITECTURE, COURSE, finetune, losses, run, same, tensors, words, write_course
from worlds import World

from megatron.data import IndexedWriter
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

BORDERS = "--reset_position_ids --reset_attention_mask --eod_mask_loss"
SEQUENCE = "--tensor_model_parallel_size 2 --sequence_parallel"
EVALUATED = re.compile(r"^ (validation|test) loss(?: of (\S+))? at iteration \d+ \| lm loss value: (\S+) ", flags=re.M)


@pytest.fixture(scope="module")
def data(
    course: str, small_model: Path, small_tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Kind of data -> flags of a run on it, in which an epoch ends on the way."""
    folder = tmp_path_factory.mktemp("texts")
    for name, start in (("sums", 0), ("more", 100)):
        with IndexedWriter(folder / name, "<u2") as writer:
            for i in range(start, start + 50):
                ids = small_tokenizer.encode(f"the sum of {i} and {i + 3} is {2 * i + 3} " * (1 + i % 4))
                writer.append(np.array([*ids, small_tokenizer.eod_id], "<u2"))
    run_flags = f"{ARCHITECTURE} {COURSE} --vocab_file {small_model} --split 80,10,10 --seq_length 32"
    text = run_flags.replace("--data_type instruction --variable_seq_lengths", "")
    rows, others = (flags.split("--data_path ")[1].split()[0] for flags in (course, write_course(folder, small_model)))
    return {
        "text": f"{text} {BORDERS} --data_path {folder / 'sums'}",
        "packed text": f"{text} {BORDERS} --variable_seq_lengths --data_path {folder / 'sums'}",
        "blended text": f"{text} --data_path 0.3 {folder / 'sums'} 0.7 {folder / 'more'}",
        "blended rows": f"{run_flags} --data_path 1 {rows} 0.37 {others}",
    }


def evaluated(output: str) -> dict[tuple[str, str], float]:
    """(split, dataset or "") -> loss."""
    return {(split, name): float(value) for split, name, value in EVALUATED.findall(output)}


def test_learns(world: World, data: dict[str, str]) -> None:
    output = run(world, 1, data["text"], "--train_iters 30 --lr_decay_style constant")
    assert re.search(r"^samples: \d+ train, \d+ validation, \d+ test$", output, flags=re.M)
    found = losses(output)
    assert len(found) == 30
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [
        ("text", 1, ""),
        ("packed text", 2, "--hidden_dropout 0.1"),
        ("blended text", 2, SEQUENCE),
        ("blended rows", 1, ""),
        ("blended rows", 2, ""),
    ],
)
def test_stopped_in_an_epoch_and_resumed_equals_straight(
    world: World, data: dict[str, str], tmp_path: Path, kind: str, size: int, layout: str
) -> None:
    """The second half reads no batch ahead."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    flags = [data[kind], layout, "--train_iters 14"]
    expected = losses(run(world, size, *flags, f"--save {straight}"))
    first = run(world, size, *flags, f"--save {halves} --exit_interval 5")
    second = run(world, size, *flags, f"--save {halves} --load {halves} --num_workers 0")
    assert losses(first) + losses(second) == expected
    assert len(expected) == 14
    assert same(tensors(straight, 14), tensors(halves, 14))


@pytest.mark.parametrize("kind", ["text", "blended text", "blended rows"])
def test_the_order_depends_neither_on_layout_nor_on_length(
    world: World, data: dict[str, str], tmp_path: Path, kind: str
) -> None:
    flags = f"{data[kind]} --lr_decay_style constant"
    expected = losses(run(world, 1, flags, "--train_iters 12"))
    found = losses(run(world, 2, flags, SEQUENCE, f"--train_iters 4 --save {tmp_path}"))
    for size, layout in ((2, "--micro_batch_size 1"), (2, "--pipeline_model_parallel_size 2 --packing padding_free")):
        rest = losses(run(world, size, flags, layout, f"--train_iters 12 --load {tmp_path}"))
        assert found + rest == pytest.approx(expected, rel=1e-4)


def test_each_dataset_is_evaluated_and_all_together(world: World, data: dict[str, str], tmp_path: Path) -> None:
    """Together is the mean over all tokens, each dataset's the same as if it were alone."""
    flags = data["blended text"].replace("--eval_iters 2", "--eval_iters 20")
    trained = run(world, 1, flags, f"--train_iters 2 --save {tmp_path} --tensorboard_dir {tmp_path / 'curves'}")
    found = evaluated(trained)
    assert list(found) == [(split, name) for split in ("validation", "test") for name in ("sums", "more", "")]
    prefixes = dict(zip(("sums", "more"), flags.split("--data_path ")[1].split()[1:4:2], strict=True))
    plain = flags.split("--data_path ")[0]
    for name, prefix in prefixes.items():
        alone = evaluated(run(world, 2, plain, f"--data_path {prefix} --load {tmp_path} --eval_only"))
        assert list(alone) == [("validation", ""), ("test", "")]
        for split in ("validation", "test"):
            assert alone[split, ""] == pytest.approx(found[split, name], rel=1e-5)
    for split in ("validation", "test"):
        low, high = sorted((found[split, "sums"], found[split, "more"]))
        assert low < found[split, ""] < high
    paths = [f"--{split}_data_path 1 {prefixes['sums']} 5 {prefixes['more']}" for split in ("train", "valid")]
    whole = evaluated(run(world, 2, plain, *paths, f"--load {tmp_path} --eval_only"))
    tokens = {name: Path(f"{prefix}.bin").stat().st_size // 2 - 1 for name, prefix in prefixes.items()}
    mean = sum(tokens[name] * whole["validation", name] for name in tokens) / sum(tokens.values())
    assert whole["validation", ""] == pytest.approx(mean, rel=1e-5)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = accumulator.EventAccumulator(str(tmp_path / "curves")).Reload().Tags()["scalars"]
    assert {"lm loss validation", "lm loss validation sums", "lm loss validation more"} <= set(curves)


def test_too_little_text_is_wrong_usage(data: dict[str, str], tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "short", "<u2") as writer:
        writer.append(np.arange(20, dtype="<u2"))
    flags = data["text"].split("--data_path")[0]
    code, output = finetune(words(flags, f"--train_iters 1 --train_data_path {tmp_path / 'short'}"))
    assert code == 2
    assert "too little text to train on: 20 tokens in 1 documents" in output
