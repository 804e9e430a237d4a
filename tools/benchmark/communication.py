"""Collectives of a step on two ranks, by layout: how many and how large, by the formulas and counted, and their time.

A random Llama is trained on random samples. The collectives of its first step are counted, on both ranks together as
the larger of the two; each is then run alone, over gloo, and its time put beside that of a step.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import option, parse_command
from tools.benchmark.random_llama import run_options
from tools.benchmark.report import ReportOptions, Table, report
from tools.benchmark.timing import timed

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
}
"""Layout -> options; `sequence` is tensor and sequence parallelism."""
RANKS = 2


@dataclass(frozen=True, kw_only=True)
class CommunicationOptions:
    """Benchmark"""

    layouts: tuple[str, ...] = option(tuple(LAYOUTS), "Those to measure.", choices=tuple(LAYOUTS), nargs="+")
    num_layers: int = option(4, "Layers of the model.", within="[2, inf)")
    hidden_size: int = option(512, "Its hidden size.")
    seq_length: int = option(512, "Tokens of a sample at most.")
    steps: int = option(5, "Steps that are timed; the figure is their median.", within="[1, inf)")
    bf16: bool = option(False, "Products in bf16 instead of fp32.")


def layout_options(options: CommunicationOptions, layout: dict[str, Any]) -> dict[str, Any]:
    """Those of the run on a layout."""
    return {
        **run_options(options.num_layers, options.hidden_size, options.seq_length),
        "variable_seq_lengths": True,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "distributed_backend": "gloo",
        "bf16": options.bf16,
        **layout,
    }


def measured(options: CommunicationOptions, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the ranks found on a layout."""
    job, figures = folder / "job.json", folder / "figures.json"
    job.write_text(json.dumps({"run": layout_options(options, layout), "steps": options.steps}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    rank = ["-m", "tools.benchmark.communication_rank", str(job), str(figures)]
    timed([sys.executable, *launcher, *rank], threads=1)
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def main(argv: list[str]) -> None:
    """Measure every layout; report."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(
        argv, CommunicationOptions, ReportOptions, prog="communication", description=description
    )
    kinds, totals = list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.layouts:
            found = measured(options, LAYOUTS[name], Path(folder))
            rows = found["collectives"]
            kinds += [
                {
                    "layout": name,
                    "collective": row["collective"],
                    "MB": row["bytes"] / 1e6 or None,
                    "counted": row["counted"],
                    "formula": row["formula"],
                    "ms alone": row["seconds alone"] * 1000,
                }
                for row in rows
            ]
            together = sum(row["seconds alone"] for row in rows)
            totals.append(
                {
                    "layout": name,
                    "collectives": sum(row["counted"] for row in rows),
                    "MB": sum(row["counted"] * row["bytes"] for row in rows) / 1e6,
                    "ms alone": together * 1000,
                    "step, ms": found["step"] * 1000,
                    "of the step": together / found["step"],
                    "as by the formulas": "no" if found["missing"] else "yes",
                }
            )
    each = {"layout": "", "collective": "", "MB": ".3f", "counted": "", "formula": "", "ms alone": ".1f"}
    whole = {"layout": "", "collectives": "", "MB": ".1f", "ms alone": ".0f", "step, ms": ".0f", "of the step": ".2f"}
    report(
        "communication",
        options,
        [
            Table("collectives of a step", each, kinds),
            Table("layouts", whole | {"as by the formulas": ""}, totals),
        ],
        output,
    )
