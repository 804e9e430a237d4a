"""Start-up: help, imports, and the time until a run has done its first iteration, each as a process of its own.

The run trains a tiny model on one rank. What it is compared with is a process that imports torch and makes a process
group; another trains a single layer by PyTorch alone, sharded as in a run. Every process runs once before it is timed,
so that files come from memory.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import option, parse_command
from tools.benchmark.report import ROOT, ReportOptions, Table, report
from tools.benchmark.timing import Timing, processor_seconds, timed

GROUP = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.destroy_process_group()
"""
SHARDED_STEP = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
layer = fully_shard(torch.nn.Linear(4, 4))
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.ones(1, 4)).sum().backward()
optimizer.step()
del layer, optimizer
dist.destroy_process_group()
"""
FLOOR = "import torch, process group"
FIRST_ITERATION = "finetune.py, until the first iteration"
SLOWEST = 12
"""Modules that `--imports` tells."""
TINY = [
    *("--model_name=llama2", "--num_layers=2", "--hidden_size=32", "--num_attention_heads=4", "--train_iters=1"),
    *("--max_position_embeddings=512", "--data_type=instruction", "--variable_seq_lengths", "--micro_batch_size=2"),
    *("--global_batch_size=4", "--log_interval=1", "--eval_iters=0", "--lr=1e-3", "--lr_decay_style=constant"),
]


@dataclass(frozen=True, kw_only=True)
class StartupOptions:
    """Benchmark"""

    vocab_file: str = option(help="A SentencePiece model.")
    rounds: int = option(5, "Rounds; the figures are medians.", within="[1, inf)")
    imports: bool = option(
        False, "Also tell what is slow to import for training, each module without those it imports."
    )


def until_line(command: Sequence[str], text: str) -> Timing:
    """Run a process; its clock stops at the first line of its output that holds `text`."""
    began, before = time.perf_counter(), processor_seconds()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        took = next((time.perf_counter() - began for line in process.stdout if text in line), None)
        process.stdout.read()
        problem = process.stderr.read()
    if took is None:
        raise RuntimeError(f"{' '.join(command)} never said {text!r}:\n{problem[-3000:]}")
    return Timing(took, processor_seconds() - before, "")


def imports(command: Sequence[str]) -> dict[str, float]:
    """Module -> milliseconds that its own import took in a Python process."""
    interpreter, *rest = command
    done = subprocess.run(
        [interpreter, "-X", "importtime", *rest], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {
        name.strip(): int(own.split(":")[1]) / 1000 for own, _, name in lines if own.split(":")[1].strip().isdigit()
    }


def commands(folder: Path, vocab_file: str) -> dict[str, list[str]]:
    """What is timed from start to end, in an order in which each finds what it reads."""
    rows = [{"question": f"{i} and {i + 3}", "response": f"{2 * i + 3}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = "instruct/preprocess_instruct_data.py"
    files = [f"--input={folder}/rows.jsonl", f"--output_prefix={folder}/rows", "--workers=1"]
    keys = ["--question_key=question", "--answer_key=response"]
    python = {
        "python": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        FLOOR: ["-c", GROUP],
        "the same, and a step of a sharded layer": ["-c", SHARDED_STEP],
        "finetune.py --help": ["finetune.py", "--help"],
        f"{script} --help": [script, "--help"],
        f"{script}, 20 rows": [script, *files, *keys, *tokenizer(vocab_file)],
    }
    return {name: [sys.executable, *words] for name, words in python.items()}


def tokenizer(vocab_file: str) -> list[str]:
    """Flags."""
    return [
        "--tokenizer_type=SentencePieceTokenizer",
        f"--vocab_file={Path(vocab_file).resolve()}",
        "--vocab_extra_ids_list=<|im_start|>,<|im_end|>",
    ]


def main(argv: list[str]) -> None:
    """Time everything in turns, and report."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(argv, StartupOptions, ReportOptions, prog="startup", description=description)
    found: dict[str, list[Timing]] = {}
    with tempfile.TemporaryDirectory() as work:
        whole = commands(Path(work), options.vocab_file)
        imported = {name: "torch" in imports(command) for name, command in whole.items()}
        run = [sys.executable, "finetune.py", *TINY, f"--train_data_path={work}/rows", *tokenizer(options.vocab_file)]
        modules = imports(run)
        for _ in range(options.rounds):
            for name, command in whole.items():
                found.setdefault(name, []).append(timed(command))
            found.setdefault(FIRST_ITERATION, []).append(until_line(run, " iteration "))
    clock = {name: statistics.median(timing.clock for timing in timings) for name, timings in found.items()}
    processor = {name: statistics.median(timing.processor for timing in timings) for name, timings in found.items()}
    rows: list[dict[str, Any]] = [
        {
            "process": name,
            "s": took,
            "processor s": processor[name],
            "of torch and group": took / clock[FLOOR],
            "of its processor s": processor[name] / processor[FLOOR],
            "imports torch": "yes" if imported.get(name, True) else "no",
        }
        for name, took in clock.items()
    ]
    layouts = {
        "process": "",
        "s": ".2f",
        "processor s": ".2f",
        "of torch and group": ".2f",
        "of its processor s": ".2f",
    }
    tables = [Table("start-up", layouts | {"imports torch": ""}, rows)]
    if options.imports:
        slowest = sorted(modules.items(), key=lambda module: -module[1])[:SLOWEST]
        slow = [{"module": name, "ms": took} for name, took in slowest]
        tables.append(Table("slowest imports", {"module": "", "ms": ".0f"}, slow))
    report("startup", options, tables, output)
