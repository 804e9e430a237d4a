"""Peak memory and speed of the conversions, beside copying the same bytes: a random Llama in bf16, made on the spot.

Each tool is timed as a whole process, in turns, of which medians are shown. Memory is the largest
resident set, mapped files included.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron.config import ModelConfig, option, parse_command, resolve_run
from tools.benchmark.random_llama import VOCABULARY, run_options
from tools.benchmark.report import ROOT, ReportOptions, Table, report

SEQ_LENGTH = 2048
TURNS = 3


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmark"""

    num_layers: int = option(16, "Layers of the model; 16 make about a billion parameters.")
    hidden_size: int = option(2048, "Its hidden size.")
    folder: str | None = option(None, "Where there is room for five copies; by default the temporary folder.")


def make_model(folder: Path, model: ModelConfig) -> None:
    """A Hugging Face folder with random weights, written tensor by tensor."""
    import json

    import torch

    from megatron.checkpoint.safetensors_file import Entry, SafetensorsWriter
    from megatron.hf.config import hf_config
    from megatron.hf.rows import parameter_shapes, to_hf

    folder.mkdir()
    shapes = parameter_shapes(model, VOCABULARY)
    entries = [Entry(to_hf(name), torch.bfloat16, shape) for name, shape in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries, {"format": "pt"}) as writer:
        for entry in entries:
            writer.write(torch.randn(entry.shape, dtype=torch.bfloat16))
    config = hf_config(model, VOCABULARY, torch.bfloat16, {"bos_token_id": 1, "eos_token_id": 2})
    (folder / "config.json").write_text(json.dumps(config))


def measured(*command: str) -> tuple[float, float]:
    """(seconds until everything is on disk, largest resident set in GB) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def commands(work: Path) -> dict[str, list[str]]:
    """What is measured, in an order in which each finds what it reads."""
    inner, cut, merged, outer = (f"{work}/{name}" for name in ("in", "sharded", "merged", "out"))
    util = ["tools/checkpoint_util.py", "--target_pipeline_parallel_size=1"]
    tools = {
        "hf_to_megatron": ["tools/hf_to_megatron.py", "llama2", f"--model-path={work}/hf", f"--out={inner}"],
        "shard to TP 4": [*util, "--target_tensor_parallel_size=4", f"--load_dir={inner}", f"--save_dir={cut}"],
        "merge to TP 1": [*util, "--target_tensor_parallel_size=1", f"--load_dir={cut}", f"--save_dir={merged}"],
        "megatron_to_hf, no check": [
            *("tools/megatron_to_hf.py", "--no_verify", f"--input_dir={merged}", f"--output_dir={outer}"),
        ],
    }
    copy = {"copy (cp -r)": ["cp", "-r", f"{work}/hf", f"{work}/copy"]}
    return copy | {name: [sys.executable, *command] for name, command in tools.items()}


def main(argv: list[str]) -> None:
    """Make the model, run everything in turns, print the table."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(argv, BenchmarkOptions, ReportOptions, prog="conversion", description=description)
    model = resolve_run(run_options(options.num_layers, options.hidden_size, SEQ_LENGTH)).model
    work = Path(tempfile.mkdtemp(dir=options.folder))
    steps = commands(work)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    try:
        make_model(work / "hf", model)
        size = (work / "hf" / "model.safetensors").stat().st_size
        for _ in range(TURNS):
            for name, command in steps.items():
                found[name].append(measured(*command))
            for folder in work.iterdir():
                if folder.name != "hf":
                    shutil.rmtree(folder)
    finally:
        shutil.rmtree(work)
    times = {name: median(clock for clock, _ in turns) for name, turns in found.items()}
    copied = next(iter(times.values()))
    rows = [
        {
            "tool": name,
            "s": times[name],
            "GB/s": size / times[name] / 1e9,
            "of copy": copied / times[name],
            "peak GB": max(peak for _, peak in turns),
        }
        for name, turns in found.items()
    ]
    layouts = {"tool": "", "s": ".1f", "GB/s": ".2f", "of copy": ".2f", "peak GB": ".2f"}
    report("conversion", options, [Table(f"conversions of {size / 1e9:.2f} GB", layouts, rows)], output)
