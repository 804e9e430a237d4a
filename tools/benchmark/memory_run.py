"""Memory of a run on one rank, on the CPU, stage by stage: loading, training and saving."""

import math
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.benchmark import checkpoint as saving
from tools.benchmark.conversion import make_model
from tools.benchmark.random_llama import VOCABULARY
from tools.benchmark.report import Table

LOADED = {"weights in fp32": 4}
TRAINING = LOADED | {"Adam": 8, "weights in bf16": 2, "gradients": 4}
COPIED = TRAINING | {"copy of weights and Adam": 12}
"""What a stage holds at its most -> bytes of a parameter, in bf16 on one rank."""

PROCESS = Path("/proc/self")


def resident() -> tuple[int, int]:
    """Bytes that are resident now, and the most since they were last looked at."""
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", (PROCESS / "status").read_text()))
    (PROCESS / "clear_refs").write_text("5")  # Linux begins to look for the most anew
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


class Stages:
    """What the stages of a run add to the memory of its process, in bytes of one of its `parameters`."""

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters
        self.before, _ = resident()
        self.rows: list[dict[str, str | float]] = []

    def add(self, name: str, work: Callable[[], object], held: dict[str, int]) -> None:
        """Do a stage, which should hold so many bytes of a parameter at its most, and little besides."""
        work()
        after, most = ((size - self.before) / self.parameters for size in resident())
        self.rows.append({"stage": name, "at most": most, "should be": sum(held.values()), "afterwards": after})


def memory_of_a_run(num_layers: int, hidden_size: int) -> Table:
    """A table of a Llama in bf16 with Adam, its weights from a Hugging Face folder."""
    from megatron.checkpoint import open_checkpoint
    from megatron.hf.rows import parameter_shapes
    from megatron.training.persistence import fill_model

    config = saving.run_config(saving.BenchmarkOptions(num_layers=num_layers, hidden_size=hidden_size))
    config = replace(config, precision=replace(config.precision, bf16=True))
    parameters = sum(map(math.prod, parameter_shapes(config.model, VOCABULARY).values()))
    with TemporaryDirectory() as work:
        folder = Path(work)
        with ProcessPoolExecutor(1, get_context("spawn")) as other:  # it leaves no memory here
            other.submit(make_model, folder / "hf", config.model).result()
        stages = Stages(parameters)
        with saving.training(config) as course:
            stages.add("build the model", lambda: None, LOADED)
            weights = open_checkpoint(folder / "hf")
            arguments = (config, weights, VOCABULARY, course.mesh, lambda message: None)
            stages.add("load its weights", lambda: fill_model(course.model, *arguments), LOADED)
            stages.add("first step", course.trainer.step, TRAINING)
            stages.add("second step", course.trainer.step, TRAINING)
            at_once, background = (saving.saver_of(course, folder / "save", in_background=x) for x in (False, True))
            stages.add("save", lambda: at_once(course.trainer.state), TRAINING)
            background.prepare(course.model)
            stages.add("begin a save in the background", lambda: background(course.trainer.state), COPIED)
            stages.add("finish it", background.finish, COPIED)
    layouts = {"stage": "", "at most": ".1f", "should be": "d", "afterwards": ".1f"}
    return Table(f"bytes a parameter, {parameters:,} parameters in bf16, Adam, one rank", layouts, stages.rows)
