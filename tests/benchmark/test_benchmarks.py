"""Every benchmark runs with tiny settings, and its JSON says what it measured, with what, and where."""

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import ROOT, write_course, write_rows

from megatron.config import ModelConfig, UsageError
from megatron.data import Sample
from megatron.model import training_flops
from tools.benchmark.__main__ import PROGRAMS, chosen, list_programs
from tools.benchmark.report import Table
from tools.benchmark.train import PEERS, SIZES, TrainOptions, peer_row, table
from tools.benchmark.train_job import IGNORED, Job, Row, Step

CONTENT = {"program", "options", "date", "commit", "versions", "machine", "tables"}
INSTALLED = [name for name in PEERS if find_spec(name)]


def run(name: str, folder: Path, *flags: str) -> dict[str, list[dict[str, Any]]]:
    """The tables of a benchmark, from its JSON; what else that says is checked."""
    path = folder / "figures.json"
    command = [sys.executable, "-m", "tools.benchmark", name, *flags, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert content.keys() == CONTENT
    assert content["program"] == name
    assert content["versions"]["torch"]
    assert content["machine"]["cores"] > 0
    assert all(title in done.stdout for title in content["tables"])
    tables: dict[str, list[dict[str, Any]]] = content["tables"]
    return tables


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sums as instructions, with the keys of the tutorial's data."""
    path = tmp_path / "input.jsonl"
    write_rows(path, 40)
    lines = [{"system_prompt": "add", **json.loads(line)} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_front_knows_every_program() -> None:
    programs = set()
    for path in (ROOT / "tools" / "benchmark").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main" and len(node.args.args) == 1:
                programs.add(path.stem)
    assert set(PROGRAMS) == programs


def test_the_front_lists_programs_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    list_programs([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [words[0] for words in lines] == list(PROGRAMS)
    assert min(map(len, lines)) > 3
    with pytest.raises(UsageError, match="there is no benchmark nothing"):
        chosen(["nothing"])[0](["nothing"])


def test_a_table_lines_its_columns_up() -> None:
    rows = [{"side": "ours", "s": 1.234}, {"side": "the floor", "s": None}]
    lines = str(Table("speed", {"side": "", "s": ".2f"}, rows)).splitlines()
    assert lines == ["speed", "side          s", "ours       1.23", "the floor      "]


def test_peers_get_the_loss_of_ours() -> None:
    """A label is a token whose prediction has weight; a row is cut off where ours is."""
    sample = Sample(np.array([5, 6, 7, 8]), np.array([0, 1, 1], np.float32))
    assert peer_row(sample, 8) == Row(tokens=[5, 6, 7, 8], labels=[IGNORED, IGNORED, 7, 8])
    assert peer_row(sample, 2) == Row(tokens=[5, 6, 7], labels=[IGNORED, IGNORED, 7])


def test_floor_counts_all_products_but_attention() -> None:
    """A document of one token attends to itself alone: 12 operations a layer and value, which the floor leaves out."""
    size = SIZES["cpu"]
    model = ModelConfig(
        model_name="llama2",
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_attention_heads=size.num_attention_heads,
        num_attention_heads_kv=size.num_attention_heads_kv,
        kv_channels=size.hidden_size // size.num_attention_heads,
        glu_activation="swiglu",
    )
    whole = training_flops(model, 32000, np.array([1]))
    assert whole == pytest.approx(size.token_flops(32000), rel=1e-3)


def a_job() -> Job:
    """Of a few steps, with no files."""
    size = SIZES["cpu"]
    paths = {"model": "", "rows": "", "data": "", "vocab_file": ""}
    return Job(**paths, vocab_size=32000, size=size, device="cpu", precision="bf16", steps=2, peer_rows=8)


def compared(first_loss_of_peer: float) -> Table:
    """The table of ours at 30 tokens a second, a peer at 10, and the floor at 60."""
    losses = {"ours": 10.0, "trl": first_loss_of_peer, "floor": float("nan")}
    speeds = {"ours": [20.0, 30.0, 40.0], "trl": [10.0], "floor": [60.0]}
    runs = {name: [[Step(1.0, loss)]] for name, loss in losses.items()}
    options = TrainOptions(input="", vocab_file="", peers=("trl",))
    return table(a_job(), speeds, runs, options)


def test_speeds_are_medians_and_ratios_are_of_them() -> None:
    ours, peer, floor = compared(10.05).rows
    assert (ours["tokens/s"], ours["of the floor"], ours["of the best peer"]) == (30, 0.5, 3)
    assert (peer["of the best peer"], floor["of the floor"]) == (1, 1)


def test_sides_that_train_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="the first loss of trl"):
        compared(10.2)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_train(tmp_path: Path, rows: Path, exact_model: Path, peer: str) -> None:
    """The program itself refuses sides whose losses are apart."""
    if peer not in INSTALLED:
        pytest.skip(f"{peer} is not installed: pip install .[bench]")
    files = [f"--input={rows}", f"--vocab_file={exact_model}"]
    (found,) = run("train", tmp_path, *files, "--quick", "--steps=2", "--precisions=fp32", f"--peers={peer}").values()
    assert [row["side"] for row in found] == ["ours", peer, "floor"]
    assert all(row["tokens/s"] > 0 for row in found)
    assert found[0]["last loss"] == pytest.approx(found[1]["last loss"], rel=1e-3)


@pytest.mark.slow
def test_communication(tmp_path: Path) -> None:
    flags = ["--layouts=sequence", "--num_layers=2", "--hidden_size=32", "--seq_length=32", "--steps=1"]
    tables = run("communication", tmp_path, *flags)
    (whole,) = tables["layouts"]
    assert whole["as by the formulas"] == "yes"
    kinds = [row for row in tables["collectives of a step"] if row["formula"]]
    assert {row["collective"] for row in kinds} == {"all_gather", "reduce_scatter", "all_reduce"}
    assert all(row["counted"] == row["formula"] for row in kinds)


@pytest.mark.slow
def test_startup(tmp_path: Path, exact_model: Path) -> None:
    tables = run("startup", tmp_path, f"--vocab_file={exact_model}", "--rounds=1", "--imports")
    torch = {row["process"]: row["imports torch"] for row in tables["start-up"]}
    script = "instruct/preprocess_instruct_data.py"
    assert [torch[name] for name in ("import torch", f"{script} --help", f"{script}, 20 rows")] == ["yes", "no", "no"]
    assert torch["finetune.py --help"] == "no"
    assert tables["slowest imports"][0]["ms"] > 0


@pytest.mark.slow
def test_preprocess(tmp_path: Path, rows: Path, exact_model: Path) -> None:
    files = [f"--input={rows}", f"--vocab_file={exact_model}"]
    tables = run("preprocess", tmp_path, *files, "--repeats=1", "--rounds=1", "--workers=1")
    assert len(tables) == 2
    assert all(row["median"] > 0 for found in tables.values() for row in found)


@pytest.mark.slow
def test_kills(tmp_path: Path, exact_model: Path) -> None:
    """A run of two steps that is killed once."""
    flags = f"{write_course(tmp_path, exact_model)} --train_iters=2 --save_interval=1"
    (found,) = run("kills", tmp_path, f"--flags={flags}", "--ranks=1", "--kills=1", "--seconds=0.01")["kills"]
    assert found["equal"] == found["runs"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("memory", ["--vocab_sizes=500", "--tokens=64", "--hidden_size=32", "--num_layers=1", "--run_hidden_size=64"]),
        ("gpt_index", ["--documents=200", "--seq_length=64", "--epochs=2", "--rounds=1"]),
        ("checkpoint", ["--num_layers=1", "--hidden_size=64", "--steps=2"]),
        ("conversion", ["--num_layers=1", "--hidden_size=256"]),
    ],
)
def test_others(tmp_path: Path, name: str, flags: list[str]) -> None:
    tables = run(name, tmp_path, *flags)
    assert all(tables.values())
