"""The benchmarks: `python -m tools.benchmark NAME [flags]`, from the project's folder; without a name, their list."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from megatron.config import UsageError, run_entry

PROGRAMS = (
    *("train", "memory", "communication", "startup"),
    *("preprocess", "gpt_index", "checkpoint", "conversion", "kills"),
)


def summary(name: str) -> str:
    """The first line that a program says of itself; it is not imported."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def list_programs(argv: list[str]) -> None:
    """Print the names."""
    if argv and argv[0] not in ("-h", "--help"):
        raise UsageError(f"there is no benchmark {argv[0]}; there are {', '.join(PROGRAMS)}")
    print("python -m tools.benchmark NAME [--help] [--json FILE] [flags]\n")
    for name in PROGRAMS:
        print(f"  {name:14} {summary(name)}")


def chosen(argv: list[str]) -> tuple[Callable[[list[str]], None], list[str]]:
    """The program that is named, and its own arguments."""
    if argv and argv[0] in PROGRAMS:
        return import_module(f"tools.benchmark.{argv[0]}").main, argv[1:]
    return list_programs, argv


if __name__ == "__main__":
    sys.exit(run_entry(*chosen(sys.argv[1:])))
