"""Kill -9 of a random rank at random moments, again and again: does a run end with the weights of an undisturbed one?

The run is started, killed and started again by the same command, which has `--auto_resume`, until it ends by itself;
then another one is, until there were enough kills. The last checkpoints are compared with that of a run left alone.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron.config import UsageError, option, parse_command
from tools.benchmark.report import ROOT, ReportOptions, Table, report

LOG = "log.txt"
LOOKS = 0.02
"""Seconds between two looks at a log."""


@dataclass(frozen=True, kw_only=True)
class KillOptions:
    """Kills"""

    flags: str = option(
        help="Those of finetune.py, in one word; --save and --auto_resume are added, --log_interval is 1."
    )
    ranks: int = option(2, "Processes of the run.", within="[1, inf)")
    kills: int = option(50, "How often one of them is killed.", within="[1, inf)")
    seconds: float = option(2.0, "A rank is killed so long after the first iteration of a start, at most.")
    seed: int = option(1, "Of the moments and the ranks.")
    folder: str | None = option(None, "Where the checkpoints go; by default the temporary folder.")


@dataclass
class Score:
    """What happened.

    Attributes:
        kills: of a rank that trained.
        in_saves: those while a checkpoint was being written.
        runs: that ended, after kills.
        equal: those of them whose last checkpoint is that of the undisturbed run.
    """

    kills: int = 0
    in_saves: int = 0
    runs: int = 0
    equal: int = 0


def started(options: KillOptions, save: Path) -> "subprocess.Popen[bytes]":
    """The run, with its output in a log beside its checkpoints."""
    save.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    command = [*launcher, "finetune.py", *shlex.split(options.flags), "--log_interval=1"]
    with (save / LOG).open("wb") as log:
        return subprocess.Popen(
            [*command, f"--save={save}", "--auto_resume"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


def wait_for_training(process: "subprocess.Popen[bytes]", save: Path) -> None:
    """Until the first iteration is logged, or the run has ended."""
    while process.poll() is None and b"\n iteration " not in (save / LOG).read_bytes():
        time.sleep(LOOKS)


def is_saving(save: Path, since: float) -> bool:
    """Whether a checkpoint is being written; what an earlier start left behind does not count."""
    try:
        return any(path.stat().st_mtime > since for path in save.glob(".iter_*.tmp"))
    except FileNotFoundError:  # it was, and is whole by now
        return False


def kill_a_rank(process: "subprocess.Popen[bytes]", chance: random.Random) -> bool:
    """Whether there was one left to kill."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(chance.choice(children)), signal.SIGKILL)
    except (IndexError, OSError):  # it has ended by itself
        return False
    return True


def disturbed(options: KillOptions, save: Path, chance: random.Random, score: Score) -> None:
    """A run that is killed and started again until it ends, or there were enough kills and it is left alone."""
    while True:
        began, process = time.time(), started(options, save)
        if score.kills < options.kills:
            wait_for_training(process, save)
            time.sleep(chance.uniform(0, options.seconds))
            was_saving = is_saving(save, began)
            if process.poll() is None and kill_a_rank(process, chance):
                score.kills += 1
                score.in_saves += was_saving
        if process.wait() == 0:
            return
        if b"finetune.py: " in (save / LOG).read_bytes().replace(b"finetune.py: failed: lost the other ranks", b""):
            raise RuntimeError(f"the run failed of itself: {(save / LOG).read_text()[-2000:]}")


def last_checkpoint(save: Path) -> dict[str, str]:
    """Checksum of each file of weights and optimizer state of the newest checkpoint, which is whole."""
    from megatron.checkpoint import large_files, open_checkpoint

    checkpoint = open_checkpoint(save, reads_all=True)
    files = large_files(checkpoint.folder, with_optimizer=True)
    return {"iteration": str(checkpoint.iteration)} | {name: written.checksum for name, written in files.items()}


def main(argv: list[str]) -> None:
    """Run undisturbed, then disturbed; print the score."""
    description = (__doc__ or "").splitlines()[0]
    options, output = parse_command(argv, KillOptions, ReportOptions, prog="kills", description=description)
    work, score, chance = Path(tempfile.mkdtemp(dir=options.folder)), Score(), random.Random(options.seed)
    try:
        if started(options, work / "undisturbed").wait():
            raise UsageError(f"--flags do not make a run: {(work / 'undisturbed' / LOG).read_text()[-2000:]}")
        expected = last_checkpoint(work / "undisturbed")
        while score.kills < options.kills:
            save = work / str(score.runs)
            disturbed(options, save, chance, score)
            score.runs += 1
            score.equal += last_checkpoint(save) == expected
            shutil.rmtree(save)
            told = f"{score.kills} kills, {score.in_saves} of them in a save; {score.equal} of {score.runs} runs equal"
            print(told, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work)
    row = {"kills": score.kills, "in a save": score.in_saves, "runs": score.runs, "equal": score.equal}
    report("kills", options, [Table("kills", dict.fromkeys(row, ""), [row])], output)
    if score.equal < score.runs:
        raise ValueError(f"{score.runs - score.equal} runs ended with other weights than the undisturbed one")
