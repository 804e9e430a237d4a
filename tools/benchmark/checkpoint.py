"""What checkpoints cost a training loop, at once and in the background, and their speed beside that of the disk.

A random Llama with Adam is trained on one rank, in fp32. Every way to save is timed in the same process, on the same
state; so are plain writes and reads of as many bytes, in turns, of which medians are shown: memory that the system has
to fetch for a file can take longer than the disk. Files are read after the system was asked to forget them.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from megatron.config import RunConfig, option, parse_command, resolve_run
from tools.benchmark.random_llama import VOCABULARY, run_options
from tools.benchmark.report import ReportOptions, Table, report
from tools.benchmark.timing import seconds

if TYPE_CHECKING:
    from megatron.checkpoint import Checkpoint
    from megatron.parallel.build import ParallelModel
    from megatron.training.saver import Saver
    from megatron.verification.course import Course

BLOCK_BYTES = 1 << 20
TURNS = 3


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmark"""

    num_layers: int = option(20, "Layers of the model; 20 make about 300 million parameters.")
    hidden_size: int = option(1024, "Its hidden size.")
    seq_length: int = option(64, "Tokens of a step at most.")
    steps: int = option(8, "Steps that are timed; the checkpoint is written after the first.")
    folder: str | None = option(None, "Where there is room for three checkpoints; by default the temporary folder.")


@dataclass(frozen=True)
class Loop:
    """Some steps with a checkpoint.

    Attributes:
        step: seconds that a step took, the longest of them.
        waited: seconds for which the loop stood still.
        whole: seconds from the beginning of the checkpoint until it was whole; 0 without one.
    """

    step: float
    waited: float
    whole: float


def run_config(options: BenchmarkOptions) -> RunConfig:
    """A run of a Llama of that size."""
    return resolve_run(run_options(options.num_layers, options.hidden_size, options.seq_length))


@contextmanager
def training(config: RunConfig) -> Iterator["Course"]:
    """A run on one rank."""
    from megatron.parallel.engine import Engine
    from megatron.parallel.mesh import open_mesh, plan_layout
    from megatron.verification.course import Course
    from megatron.verification.yardstick import RandomSamples

    assert config.data.seq_length
    samples = RandomSamples(16, config.data.seq_length, VOCABULARY, config.data)
    with open_mesh(plan_layout(1, config.parallel, config.model), config.parallel) as mesh:
        course = Course(config, VOCABULARY, samples, mesh)
        course.trainer.engine = Engine(course.model, mesh, seed=1, per_token=True)  # one that keeps no gradients
        yield course


def saver_of(course: "Course", save: Path, *, in_background: bool) -> "Saver":
    """What writes the run's checkpoints to `save`, of which the newest is kept."""
    from megatron.training.saver import Saver
    from megatron.verification.course import NoTokenizer

    options = replace(course.config.checkpoint, save=str(save), async_save=in_background, keep_last=1)
    config = replace(course.config, checkpoint=options)
    return Saver(config, course.mesh, cast(Any, NoTokenizer()), VOCABULARY, lambda message: None)


def loop(
    course: "Course", saver: "Saver | None", steps: int, prepare: "Callable[[ParallelModel], None] | None" = None
) -> Loop:
    """Train on, and save after the first step; `prepare` is called before, as at the start of a run."""
    waited, times = 0.0, []
    if prepare:
        prepare(course.model)
    for number in range(steps):
        times.append(seconds(course.trainer.step))
        if saver:
            waited += seconds(saver.finish_if_written)
            waited += seconds(lambda: saver(course.trainer.state)) if number == 0 else 0.0
    if saver:
        waited += seconds(saver.finish)
    return Loop(max(times[1:]), waited, saver.seconds or 0.0 if saver else 0.0)


def write_plainly(path: Path, size: int) -> None:
    """As many bytes, and on the disk."""
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK_BYTES):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """All bytes."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK_BYTES):
            pass


def in_turns(works: dict[str, Callable[[], object]], before: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each; `before` is done first, and takes none of them."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, work in works.items():
            before()
            taken[name].append(seconds(work))
    return {name: median(times) for name, times in taken.items()}


def forgotten(*files: Path) -> None:
    """Ask the system to drop what it keeps of these files in memory."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tensor_files(folder: Path) -> list[Path]:
    """All below it."""
    return sorted(folder.rglob("*.safetensors"))


def load(course: "Course", checkpoint: "Checkpoint") -> None:
    """Weights and optimizer state, as a run that goes on does."""
    from megatron.training.persistence import fill_model, resume

    state = course.trainer.state
    fill_model(course.model, course.config, checkpoint, VOCABULARY, course.mesh, lambda message: None)
    resume(state, checkpoint, course.config, VOCABULARY, lambda message: None)


def main(argv: list[str]) -> None:
    """Train, save in each way, load, write and read plainly; print the tables."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(argv, BenchmarkOptions, ReportOptions, prog="checkpoint", description=description)
    from megatron.checkpoint import open_checkpoint

    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        with training(run_config(options)) as course:
            course.trainer.step()
            kept = saver_of(course, work / "save", in_background=True)
            at_once = saver_of(course, work / "save", in_background=False)
            loops = {
                "none": loop(course, None, options.steps),
                "at once": loop(course, at_once, options.steps),
                "none, memory is taken": loop(course, None, options.steps, kept.prepare),
                "in the background, first": loop(course, kept, options.steps),
                "in the background, later": loop(course, kept, options.steps),
            }
            size = sum(path.stat().st_size for path in tensor_files(work))
            plain = work / "plain.safetensors"
            writes: dict[str, Callable[[], object]] = {
                "plain writes": lambda: write_plainly(plain, size),
                "saving at once": lambda: at_once(course.trainer.state),
            }
            speeds = in_turns(writes, os.sync)
            checkpoint = open_checkpoint(work / "save")
            reads: dict[str, Callable[[], object]] = {
                "plain reads": lambda: read_plainly(plain),
                "comparing checksums": lambda: open_checkpoint(work / "save", reads_all=True),
                "loading": lambda: load(course, checkpoint),
            }
            speeds |= in_turns(reads, lambda: forgotten(*tensor_files(work)))
            parameters = sum(part.local.numel() for part in course.parts)
    finally:
        shutil.rmtree(work)
    what = f"{parameters:,} parameters, {size / 1e9:.2f} GB of weights and optimizer state in fp32, one rank"
    report("checkpoint", options, [waiting(loops, what), disk(speeds, size)], output)


def waiting(loops: dict[str, Loop], what: str) -> Table:
    """What each way to save cost the loop."""
    rows = [
        {
            "checkpoint": name,
            "training waits, s": found.waited,
            "of at once": found.waited / loops["at once"].waited,
            "whole after, s": found.whole,
            "longest step, s": found.step,
        }
        for name, found in loops.items()
    ]
    layouts = {"training waits, s": ".2f", "of at once": ".2f", "whole after, s": ".2f", "longest step, s": ".2f"}
    return Table(what, {"checkpoint": "", **layouts}, rows)


def disk(speeds: dict[str, float], size: int) -> Table:
    """How fast each is, beside plain writes or reads of as many bytes."""
    plain = {name: "plain writes" if name in ("plain writes", "saving at once") else "plain reads" for name in speeds}
    rows = [
        {"work": name, "s": took, "GB/s": size / took / 1e9, "of plain": speeds[plain[name]] / took}
        for name, took in speeds.items()
    ]
    return Table("beside the disk", {"work": "", "s": ".2f", "GB/s": ".2f", "of plain": ".2f"}, rows)
