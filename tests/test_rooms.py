"""The rules that keep the rooms apart and small, checked on the source; and proof that each check can fail."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [
    *("config", "tokenizer", "data", "inspection", "model", "hf", "parallel", "optim", "checkpoint", "training"),
    "verification",
]
"""In reading order; a room imports only rooms before it."""
NOT_IMPORTED = {
    "config": {"torch"},
    "tokenizer": {"torch"},
    "data": {"torch"},
    "inspection": {"torch"},
    "model": {"megatron.tokenizer", "megatron.data"},
}
"""Further imports a room does without."""
TOP_LEVEL = {
    *("megatron", "instruct", "tools", "finetune.py", "tests", "docs"),
    *("pyproject.toml", "mkdocs.yml", "README.md", "CHANGELOG.md", "LICENSE"),
}
GRAB_BAGS = {"utils", "helpers", "common", "misc"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_ENTRY = 350, 60, 90


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def entry_scripts() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("instruct/*.py"), *ROOT.glob("tools/*.py")])


LIBRARY = python_files("megatron")
EVERYTHING = sorted({*LIBRARY, *entry_scripts(), *python_files("instruct", "tools", "tests")})


def check(tree: ast.AST, room: str) -> list[str]:
    """All violations of a library file in `room`."""
    return [*forbidden_imports(tree, room), *forbidden_habits(tree, room), *forbidden_loads(tree)]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also those inside functions; a relative one is spelled with its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def forbidden_imports(tree: ast.AST, room: str) -> list[str]:
    """Imports of rooms that come later, or of what the room does without."""
    problems = []
    for line, name in imported_modules(tree):
        parts = name.split(".")
        if name.startswith(".."):
            problems.append(f"line {line}: reach other rooms by their full name, not {name}")
        if parts[0] == "megatron" and len(parts) > 1 and parts[1] != room:
            is_earlier = parts[1] in ROOMS and room in ROOMS and ROOMS.index(parts[1]) < ROOMS.index(room)
            if not is_earlier:
                problems.append(f"line {line}: {room} imports {name}, which does not come before it")
        for banned in NOT_IMPORTED.get(room, ()):
            if name == banned or name.startswith(banned + "."):
                problems.append(f"line {line}: {room} imports {name}")
    return problems


def forbidden_habits(tree: ast.AST, room: str) -> list[str]:
    """Global state, the command line, and ending the process from inside the library."""
    problems = []
    reads_types = "typing.get_args" in {name for _, name in imported_modules(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            problems.append(f"line {node.lineno}: global statement")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in {"sys.exit", "sys.argv"}:
                problems.append(f"line {node.lineno}: {name}")
        is_name = isinstance(node, ast.Name | ast.Attribute)
        if is_name and not reads_types and (getattr(node, "id", "") or node.attr) == "get_args":
            problems.append(f"line {node.lineno}: get_args")
    for line, name in imported_modules(tree):
        if name in {"sys.exit", "sys.argv"} or (name.split(".")[0] == "argparse" and room != "config"):
            problems.append(f"line {line}: import of {name}")
    return problems


def forbidden_loads(tree: ast.AST) -> list[str]:
    """Reading files in ways that can run code."""
    problems = [
        f"line {line}: import of {name}"
        for line, name in imported_modules(tree)
        if name.split(".")[0] in {"pickle", "dill", "shelve", "marshal"}
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
            problems.append(f"line {node.lineno}: torch.load without weights_only=True")
        if given.get("allow_pickle"):
            problems.append(f"line {node.lineno}: allow_pickle")
    return problems


def too_long(source: str, longest_file: int) -> list[str]:
    """The file, and each function of it, over the limits."""
    lines = len(source.splitlines())
    problems = [f"{lines} lines, the limit is {longest_file}"] if lines > longest_file else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                problems.append(f"{node.name} has {length} lines, the limit is {LONGEST_FUNCTION}")
    return problems


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=names)
def test_rooms_stay_apart(path):
    room = path.relative_to(ROOT / "megatron").parts[0]
    assert check(ast.parse(path.read_text(encoding="utf-8")), room) == []


@pytest.mark.parametrize("path", EVERYTHING, ids=names)
def test_files_and_functions_stay_small(path):
    limit = LONGEST_ENTRY if path in entry_scripts() else LONGEST_FILE
    assert too_long(path.read_text(encoding="utf-8"), limit) == []


def test_no_grab_bags():
    assert [names(path) for path in EVERYTHING if GRAB_BAGS & {*path.relative_to(ROOT).parts, path.stem}] == []


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_has_a_door(room):
    door = ROOT / "megatron" / room / "__init__.py"
    assert door.is_file(), f"{names(door)} is missing"
    assert ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))), f"{names(door)} has no docstring"


def test_there_are_no_other_rooms():
    folders = {path.parent.name for path in (ROOT / "megatron").glob("*/*.py")}
    assert folders == set(ROOMS)


def test_nothing_else_at_the_top_level():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in result.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("room", "source", "problem"),
    [
        ("model", "from megatron.parallel.plan import PLAN", "does not come before it"),
        ("model", "def f():\n    import megatron.hf", "does not come before it"),
        ("model", "from megatron.data.batch import MicroBatch", "model imports megatron.data.batch"),
        ("model", "from megatron import training", "does not come before it"),
        ("hf", "from ..parallel import plan", "by their full name"),
        ("data", "from megatron.elsewhere import thing", "does not come before it"),
        ("data", "import torch.nn", "data imports torch.nn"),
        ("tokenizer", "from torch import nn", "tokenizer imports torch"),
        ("optim", "def f():\n    global count\n    count = 1", "line 2: global statement"),
        ("optim", "import sys\nsys.exit(2)", "line 2: sys.exit"),
        ("optim", "import sys\nprint(sys.argv)", "line 2: sys.argv"),
        ("optim", "from sys import argv", "import of sys.argv"),
        ("config", "from sys import exit", "import of sys.exit"),
        ("optim", "import argparse", "import of argparse"),
        ("optim", "args = get_args()", "get_args"),
        ("optim", "args = state.get_args()", "get_args"),
        ("checkpoint", "import pickle", "import of pickle"),
        ("checkpoint", "torch.load(path)", "without weights_only=True"),
        ("checkpoint", "torch.load(path, weights_only=False)", "without weights_only=True"),
        ("data", "numpy.load(path, allow_pickle=True)", "allow_pickle"),
    ],
)
def test_checks_find_planted_faults(room, source, problem):
    found = check(ast.parse(source), room)
    assert any(problem in fault for fault in found), found


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("training", "from megatron.config import UsageError\nfrom megatron.optim.schedule import ParameterSchedule"),
        ("model", "import torch\nfrom megatron.config import ModelConfig\nfrom megatron.model.norms import Norm"),
        ("config", "import argparse"),
        ("config", "from typing import get_args\nget_args(hint)"),
        ("hf", "torch.load(path, weights_only=True)"),
        ("data", "from .batch import MicroBatch"),
    ],
)
def test_checks_let_good_code_pass(room, source):
    assert check(ast.parse(source), room) == []


def test_lengths_are_measured():
    body = "def f():\n" + "    x = 1\n" * 60
    assert too_long(body, 350) == ["f has 61 lines, the limit is 60"]
    assert too_long("x = 1\n" * 351, 350) == ["351 lines, the limit is 350"]
    assert too_long("def f():\n" + "    x = 1\n" * 59 + "y = 1\n", 350) == []
