"""Whole runs of `finetune.py` on tiny data, on one rank or in a world of several."""

import contextlib
import importlib.util
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

from torch import Tensor
from worlds import World

from megatron.checkpoint import open_checkpoint
from megatron.config import run_entry

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (
    "--model_name llama2 --num_layers 2 --hidden_size 32 --num_attention_heads 4 --num_attention_heads_kv 2 "
    "--max_position_embeddings 64 --init_method_std 0.1"
)
COURSE = (
    "--data_type instruction --variable_seq_lengths --tokenizer_type SentencePieceTokenizer "
    "--vocab_extra_ids_list <|im_start|>,<|im_end|> --micro_batch_size 2 --global_batch_size 8 --lr 1e-2 "
    "--lr_decay_style cosine --log_interval 1 --eval_interval 100 --eval_iters 2"
)


def finetune(argv: list[str]) -> tuple[int, str]:
    """Exit code and standard output of `finetune.py` in this process."""
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "finetune.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = run_entry(module.main, argv)
    return code, output.getvalue()


def words(*texts: str) -> list[str]:
    """A command line from pieces of text."""
    return " ".join(texts).split()


def losses(output: str) -> list[float]:
    """The training loss of each iteration logged."""
    return [float(value) for value in re.findall(r"^ iteration .*\| lm loss: ([^ ]+) \|", output, flags=re.M)]


def tensors(folder: Path, iteration: int | None = None) -> dict[str, Tensor]:
    """All weights and optimizer state of a checkpoint."""
    checkpoint = open_checkpoint(folder, iteration)
    weights = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names()}
    state = checkpoint.optimizer
    return weights | ({name: state.read(name) for name in state.names()} if state else {})


def write_rows(path: Path, count: int) -> None:
    """Sums as instructions."""
    rows = [
        {"question": f"the sum of {i} and {i + 3}", "response": f"{i} and {i + 3} is {2 * i + 3} " * (1 + i % 3)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether all tensors are bitwise the same."""
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


def preprocess(argv: list[str]) -> None:
    """`instruct/preprocess_instruct_data.py` in this process."""
    runpy.run_path(str(ROOT / "instruct" / "preprocess_instruct_data.py"))["main"](argv)


def run(world: World, size: int, *flags: str) -> str:
    """A run on `size` ranks that must succeed; what the main rank said."""
    results = world(size, finetune, words(*flags))
    assert [code for code, _ in results] == [0] * size, results[0][1]
    return results[0][1]


def write_course(folder: Path, model: Path) -> str:
    """Flags of a run on 80 rows, which are written to `folder`, with the tokenizer's `model`."""
    write_rows(folder / "rows.jsonl", 80)
    command = [
        *("--input", str(folder / "rows.jsonl"), "--output_prefix", str(folder / "rows"), "--workers", "1"),
        *("--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", str(model)),
        *("--vocab_extra_ids_list", "<|im_start|>,<|im_end|>", "--question_key", "question"),
        *("--answer_key", "response"),
    ]
    preprocess(command)
    return f"{ARCHITECTURE} {COURSE} --vocab_file {model} --data_path {folder / 'rows'} --split 80,10,10"
