"""What a benchmark ends with: tables to read, and the same figures as JSON, with what they were measured on."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron.config import option

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron-llm", "torch", "numpy", "sentencepiece", "orjson", "transformers", "trl", "litgpt")
"""Whose versions a report tells."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Report"""

    json: str | None = option(None, "Write the figures to this file, too.")


@dataclass(frozen=True)
class Table:
    """Figures that belong together.

    Attributes:
        title: said above them.
        layouts: column -> how its figures are written, as in a format string; the first column names the row.
        rows: column -> figure; a row may lack some.
    """

    title: str
    layouts: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        texts = [[_text(row.get(name), layout) for name, layout in self.layouts.items()] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.layouts, *texts, strict=True)]
        lines = [self.title]
        for cells in [list(self.layouts), *texts]:
            first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
        return "\n".join(lines)


def report(program: str, options: Any, tables: Sequence[Table], output: ReportOptions) -> None:
    """Print the tables; write them where `output` says, with `options`, an options dataclass."""
    print(*tables, sep="\n\n", flush=True)
    if output.json:
        figures = {table.title: [dict(row) for row in table.rows] for table in tables}
        content = {"program": program, "options": asdict(options), **circumstances(), "tables": figures}
        Path(output.json).write_text(json.dumps(content, indent=1) + "\n")


def circumstances() -> dict[str, Any]:
    """When, with what and on which machine: date, commit, versions, processor, cores, memory, GPU and present load."""
    commit = _output("git", "describe", "--always", "--dirty")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpu": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
            "load_average": os.getloadavg()[0],
        },
    }


def _text(value: Any, layout: str) -> str:
    return "" if value is None else format(value, layout)


def _output(*command: str) -> str | None:
    """What a command says, if it is there and succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
