"""The batch scripts of `tools/slurm/` on a real Slurm: an interrupted training ends as one that ran through."""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import ENDED, Cluster
from tiny_runs import ROOT, run, same, tensors
from worlds import World

ITERATIONS = 200
SCRIPTS = ROOT / "tools" / "slurm"
MAKE_ROOM = "srun --partition=high --nodes=2 --exclusive true"
"""Urgent work that takes both nodes: Slurm sends the job there the signal of its `--signal`, as before a time limit."""


@dataclass(frozen=True)
class Job:
    """A submitted batch script: its number, what it writes, and where it saves."""

    number: str
    log: Path
    save: Path

    def trains(self) -> bool:
        """Whether an iteration has been logged."""
        return self.log.exists() and " iteration " in self.log.read_text()


@pytest.fixture
def submit(cluster: Cluster, course: str, tmp_path: Path) -> Callable[..., Job]:
    """`submit(script, *options of sbatch, flags="", **environment)`: a run on tiny data."""

    def submit(script: str, *options: str, flags: str = "", **environment: str) -> Job:
        log, save = tmp_path / "job.log", tmp_path / "save"
        command = ["sbatch", "--parsable", f"--output={log}", "--gpus-per-node=1", *options, str(SCRIPTS / script)]
        variables = {"SAVE": str(save), "TRAIN_ITERS": str(ITERATIONS)} | environment
        return Job(cluster.run(*command, *course.split(), *flags.split(), **variables), log, save)

    return submit


@pytest.fixture(scope="module")
def straight(cluster: Cluster, world: World, course: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the run on two ranks that nothing interrupts, without Slurm."""
    save = tmp_path_factory.mktemp("straight")
    run(world, 2, course, f"--train_iters {ITERATIONS} --save {save}")
    return save


def until_training(cluster: Cluster, job: Job) -> None:
    """Wait for the first iteration; a job that ends before it fails."""
    cluster.until(lambda: job.trains() or cluster.job(job.number)["JobState"] in ENDED, "the job trains")
    assert job.trains(), job.log.read_text()


def assert_went_on(job: Job, straight: Path) -> None:
    """The training stopped once, went on there, and ended with the weights and optimizer state of the straight one."""
    output = job.log.read_text()
    (resumed_at,) = map(int, re.findall(r"going on from iteration (\d+)", output))
    assert 0 < resumed_at < ITERATIONS
    assert "2 ranks on cpu" in output
    assert same(tensors(job.save, ITERATIONS), tensors(straight, ITERATIONS))


@pytest.mark.parametrize(
    ("script", "processes", "interruption"),
    [
        ("multi_node.sh", 1, MAKE_ROOM),
        # To the step only, as Slurm does it where preempt_send_user_signal is not set.
        ("single_node.sh", 2, "scancel --signal=TERM {job}"),
    ],
    ids=["script told", "step told"],
)
def test_a_preempted_job_requeues_itself_and_ends_as_a_straight_run(
    cluster: Cluster,
    submit: Callable[..., Job],
    straight: Path,
    script: str,
    processes: int,
    interruption: str,
) -> None:
    job = submit(script, PROCESSES_PER_NODE=str(processes))
    until_training(cluster, job)
    cluster.run(*interruption.format(job=job.number).split())
    fields = cluster.ended(job.number)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), job.log.read_text()
    assert "back into the queue" in job.log.read_text()
    assert_went_on(job, straight)


def test_an_array_goes_on_element_by_element_until_nothing_is_left(
    cluster: Cluster, submit: Callable[..., Job], straight: Path
) -> None:
    job = submit("array_of_resumptions.sh", "--array=1-3%1")
    until_training(cluster, job)
    cluster.run(*MAKE_ROOM.split())
    elements = [cluster.ended(f"{job.number}_{element}") for element in (1, 2, 3)]
    ends = [(fields["JobState"], fields["Restarts"]) for fields in elements]
    assert ends == [("COMPLETED", "0")] * 3, job.log.read_text()
    assert job.log.read_text().endswith(f"iteration {ITERATIONS} is saved: nothing is left to do\n")
    assert_went_on(job, straight)


def test_an_error_ends_the_job(cluster: Cluster, submit: Callable[..., Job]) -> None:
    job = submit("single_node.sh", flags="--tensor_model_parallel_size 3", SRUN_ARGS="--label --input=none")
    fields = cluster.ended(job.number)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0"), job.log.read_text()
    assert re.search(r"^0: .*error: .*--tensor_model_parallel_size 3", job.log.read_text(), flags=re.M)


def test_a_signal_behind_the_end_of_the_training_still_requeues(tmp_path: Path) -> None:
    """Nothing is left then to hand it on to."""
    script = """set -euo pipefail
        srun() { :; }
        scontrol() { echo "scontrol $*"; }
        source tools/slurm/training_job.sh
        train
        kill -USR1 $$
        requeue_if_unfinished"""
    names = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_CPUS_ON_NODE", "SLURM_JOB_NODELIST", "TRAIN_ITERS")
    environment = os.environ | dict.fromkeys(names, "7") | {"SAVE": str(tmp_path)}
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["scontrol requeue 7"]), result.stderr


@pytest.mark.parametrize("missing", ["SAVE", "TRAIN_ITERS"])
def test_a_script_names_the_variable_it_lacks(missing: str) -> None:
    given = {"SAVE": "folder", "TRAIN_ITERS": "1"}
    environment = {name: value for name, value in (os.environ | given).items() if name != missing}
    result = subprocess.run(
        ["bash", SCRIPTS / "single_node.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )
    assert result.returncode
    assert re.search(rf"{missing}: (names|is) ", result.stderr)
