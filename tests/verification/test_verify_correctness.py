"""The tool that compares with Hugging Face's models: it passes for every family on every layout, and names a layer."""

import contextlib
import io
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from worlds import World

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.reshard import Layout, reshard
from megatron.config import run_entry
from megatron.data import IndexedWriter
from megatron.verification.logit_rows import TOLERANCES, compare_row, report_rows

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("llama 3.1", "mistral", "qwen2", "qwen3", "falcon 7b", "falcon 40b", "gpt2")
TP2, PP2 = ["--tensor_model_parallel_size", "2"], ["--pipeline_model_parallel_size", "2"]
LAYOUTS = {
    "2 tensor x 1 pipeline x 2 data": [*TP2, "--sequence_parallel", "--packing", "none", "--micro_batch_size", "2"],
    "1 tensor x 2 pipeline x 2 data": [*PP2, "--micro_batch_size", "3"],
    "2 tensor x 2 pipeline x 1 data": [*TP2, *PP2],
}
LENGTHS = [9, 33, 1, 50, 2, 17, 28, 12]
"""Of the rows of data; one has nothing to predict, one is cut off."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instruction data, with an id that the tiny models do not have."""
    path, random = tmp_path_factory.mktemp("data") / "rows", np.random.default_rng(1)
    with IndexedWriter(f"{path}-text", "<i4") as text, IndexedWriter(f"{path}-role", "<u2") as role:
        for length in LENGTHS:
            text.append(np.r_[random.integers(0, 103, length - 1), 104])
            role.append(np.sort(random.integers(0, 3, length)))
    return path


def tool(argv: list[str]) -> tuple[int, str]:
    """On each rank: exit code and output."""
    main = runpy.run_path(str(ROOT / "tools" / "verify_correctness.py"))["main"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = run_entry(main, argv)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, output.getvalue()


def compare(world: World, size: int, load: Path, *flags: object) -> tuple[set[int], str]:
    """Exit codes of all ranks, and what the main rank said."""
    words = ["--load", load, "--use_checkpoint_args", "--seq_length", 40, *flags]
    results = world(size, tool, [str(word) for word in words])
    return {code for code, _ in results}, results[0][1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_on_every_layout(world: World, tmp_path: Path, prefix: Path, variant: str) -> None:
    save_family(tmp_path, variant)
    for layout, flags in LAYOUTS.items():
        codes, output = compare(world, 4, tmp_path, "--data_path", prefix, *flags)
        assert codes == {0}, output
        assert f"4 ranks on cpu: {layout}" in output
        assert f"7 rows of {prefix}, cut off at 40 tokens; 7 tokens beyond the vocabulary of 103 became 0" in output
        assert re.findall(r"^ +(\d|all) +(\d+) ", output, flags=re.M) == [
            *((str(n), str(min(length - 1, 40))) for n, length in enumerate(n for n in LENGTHS if n > 1)),
            ("all", "135"),
        ]
        assert float(re.findall(r"ok: largest error of a logit (\S+) ", output)[0]) < 1e-4


def test_a_converted_and_resharded_checkpoint(world: World, tmp_path: Path) -> None:
    """On random tokens in bf16; the layout is the checkpoint's."""
    save_family(tmp_path / "hf", "falcon 40b")
    reshard(open_checkpoint(tmp_path / "hf"), tmp_path / "cut", Layout(2, 2))
    flags = ["--huggingface_model", tmp_path / "hf", "--huggingface_device", "cpu", "--bf16", "--rows", 3]
    codes, output = compare(world, 4, tmp_path / "cut", "--model_name", "falcon", *flags)
    assert codes == {0}, output
    assert "2 tensor x 2 pipeline x 1 data" in output
    assert "3 rows of up to" in output
    codes, output = compare(world, 1, tmp_path / "cut")
    assert codes == {2}
    assert "--huggingface_model is missing" in output


@pytest.mark.parametrize(
    ("variant", "name", "layout", "expected"),
    [
        ("llama 3.1", "model.layers.1.mlp.up_proj.weight", 0, "layer 1"),
        ("falcon 40b", "transformer.h.1.mlp.dense_h_to_4h.weight", 1, "layer 1"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", 2, "layer 0"),
        ("qwen3", "model.embed_tokens.weight", 0, "embedding"),
        ("mistral", "lm_head.weight", 2, None),
    ],
)
def test_a_planted_error_is_found(
    world: World, tmp_path: Path, prefix: Path, variant: str, name: str, layout: int, expected: str | None
) -> None:
    save_family(tmp_path / "hf", variant)
    shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights[name][:, 5] += 0.3
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    named = ["--huggingface_model", tmp_path / "hf", "--data_path", prefix, *list(LAYOUTS.values())[layout]]
    codes, output = compare(world, 4, tmp_path / "copy", *named)
    assert codes == {1}, output
    assert "FAILED: largest error of a logit" in output
    line = f"first layer that differs: {expected} (relative error" if expected else "all layers agree: the difference"
    assert line in output


def test_settings_and_sizes_that_differ(world: World, tmp_path: Path) -> None:
    save_family(tmp_path / "window", "mistral")
    save_family(tmp_path / "none", "mistral, no window")
    save_family(tmp_path / "gpt2", "gpt2")
    codes, output = compare(world, 1, tmp_path / "none", "--huggingface_model", tmp_path / "window")
    assert codes == {1}
    assert "first layer that differs: layer 0" in output
    assert "  --sliding_window_size is None in our model and 5 in theirs" in output
    codes, output = compare(world, 1, tmp_path / "none", "--tolerance", "0", "--rows", "0")
    assert codes == {2}
    assert "--rows 0 is not positive" in output
    model = open_checkpoint(tmp_path / "gpt2")
    reshard(model, tmp_path / "more", Layout(), vocab_size=110)
    codes, output = compare(world, 1, tmp_path / "more", "--huggingface_model", tmp_path / "gpt2")
    assert codes == {2}
    assert "has 110 rows of the vocabulary, " in output


def test_what_is_not_a_number_fails() -> None:
    logits, labels, weights = torch.zeros(3, 4), np.zeros(3, np.int64), np.ones(3, np.float32)
    broken = logits.clone()
    broken[1, 2] = torch.nan
    for ours, theirs in ((broken, logits), (logits, broken)):
        row = compare_row(0, ours, theirs, labels, weights)
        assert not report_rows([row], row.loss, TOLERANCES[torch.float32])[1]
    same = compare_row(0, logits, logits, labels, 0 * weights)
    text, passes = report_rows([same], 0.0, TOLERANCES[torch.float32])
    assert passes
    assert "    0        3    0.0e+00    0.0e+00   100.00%          -          -" in text
