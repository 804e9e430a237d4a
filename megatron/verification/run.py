"""A verification from end to end: shrink, train on the mesh and plainly, compare, say what was found."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron.checkpoint import open_checkpoint
from megatron.config import RunConfig
from megatron.data import Samples
from megatron.parallel.mesh import Mesh, leaves_no_group, open_mesh, plan_layout, world_size_of
from megatron.training.log import main_rank_writer
from megatron.verification.checks import compare_packings, compare_resumed, compare_with_plain
from megatron.verification.course import Course, MeshStep
from megatron.verification.diagnosis import causes
from megatron.verification.evidence import Evidence
from megatron.verification.report import description, table, verdict
from megatron.verification.resumption import Resumption, changed_settings, resumed_config
from megatron.verification.rows import PACKED, RESUMED, TOLERANCES, left_out, new_notes
from megatron.verification.shrink import SEQ_LENGTH, shrink, vocabulary
from megatron.verification.yardstick import RandomSamples, train_plainly

SAVED_AFTER = 1
"""Steps before the checkpoint."""
OTHER_PACKING = {"none": "padding_free", "padding_free": "none"}


@leaves_no_group
def verify(config: RunConfig) -> bool:
    """Whether a tiny model trains on the layout of `config` as on one device; says so on the main rank's output.

    Raises:
        UsageError: the layout does not fit the number of processes or the model.
    """
    layout = plan_layout(world_size_of(os.environ), config.parallel, config.model)
    small, vocab_size = shrink(config, layout), vocabulary(layout.tensor)
    size = small.training.global_batch_size
    assert size
    samples = RandomSamples(
        2 * size + 7, SEQ_LENGTH + 7, vocab_size, small.data
    )  # so few that an epoch ends on the way
    with open_mesh(layout, config.parallel) as mesh:
        say = main_rank_writer(mesh.is_main)
        trial = Trial(small, vocab_size, samples, mesh)
        course = trial.course()
        say(description(config, small, vocab_size, mesh, course.model))
        evidence = trial.evidence(course)
        say("\n" + table(evidence.rows))
        found = [] if all(row.ok for row in evidence.rows) else causes(evidence)
        say("\n" + verdict(evidence.rows, found))
    return all(row.ok for row in evidence.rows)


@dataclass(frozen=True)
class Trial:
    """The tiny run, on the mesh and plainly."""

    config: RunConfig
    vocab_size: int
    samples: Samples
    mesh: Mesh

    def course(self) -> Course:
        """The run on the mesh, at its beginning."""
        return Course(self.config, self.vocab_size, self.samples, self.mesh)

    def evidence(self, course: Course) -> Evidence:
        """Everything that was found."""
        count = self.config.training.train_iters
        assert count
        plain = train_plainly(self.config, self.vocab_size, self.samples, count)
        notes, reasons = new_notes(plain[0]), dict[str, str]()
        steps, resumption = self._steps(course)
        compare_with_plain(notes, course.parts, steps, plain)
        other = self._other_packing()
        if other:
            compare_packings(notes, steps[0], other, plain[0])
        else:
            reasons[PACKED] = "a mean of means (--no_calculate_per_token_loss) has no packed form"
        if resumption is None:
            reasons[RESUMED] = "not all machines see the temporary folder; let TMPDIR name a shared one"
        elif resumption.error:
            notes.add(RESUMED, SAVED_AFTER, float("inf"))
        else:
            compare_resumed(notes, steps, resumption.steps, SAVED_AFTER, plain[-1])
        rows = left_out(notes.rows(self.mesh, TOLERANCES[course.model.compute_dtype]), reasons)
        return Evidence(
            config=self.config,
            vocab_size=self.vocab_size,
            samples=self.samples,
            mesh=self.mesh,
            course=course,
            plain=plain,
            steps=steps,
            other_packing=other,
            resumption=resumption,
            rows=rows,
        )

    def _steps(self, course: Course) -> tuple[list[MeshStep], Resumption | None]:
        """All steps in a row, and what came of a checkpoint on the way; None where there is no place for one."""
        count = self.config.training.train_iters
        assert count
        with shared_folder(self.mesh) as folder:
            steps = [course.step() for _ in range(SAVED_AFTER)]
            if folder:
                course.save(folder)
            steps += [course.step() for _ in range(SAVED_AFTER, count)]
            return steps, self._resume(folder, count - SAVED_AFTER) if folder else None

    def _resume(self, folder: Path, count: int) -> Resumption:
        """A run that goes on from the checkpoint in `folder`, built from nothing else."""
        problem = ""
        try:
            checkpoint = open_checkpoint(folder)
            config = resumed_config(self.config, checkpoint)
            changed = changed_settings(self.config, config)
            course = Course(config, self.vocab_size, self.samples, self.mesh, checkpoint)
        except ValueError as error:  # a checkpoint that is not enough is a finding
            problem = str(error)
        if self.mesh.any(bool(problem)):
            return Resumption(error=problem.replace(f"{folder}/", "") or "another rank says why")
        loaded = course.weights()
        return Resumption(changed, loaded, [course.step() for _ in range(count)])

    def _other_packing(self) -> MeshStep | None:
        """The first step of the run with the other `--packing`, if it has one."""
        packing = self.config.data.packing
        assert packing
        if not self.config.training.calculate_per_token_loss:
            return None
        data = replace(self.config.data, packing=OTHER_PACKING[packing])
        return Course(replace(self.config, data=data), self.vocab_size, self.samples, self.mesh).step()


@contextmanager
def shared_folder(mesh: Mesh) -> Iterator[Path | None]:
    """A temporary folder for all ranks; None where some do not see it."""
    path = [tempfile.mkdtemp(prefix="verify-layout-") if mesh.is_main else ""]
    dist.broadcast_object_list(path, device=mesh.device)
    folder = Path(path[0])
    try:
        yield None if mesh.any(not folder.is_dir()) else folder
        mesh.barrier()
    finally:
        if mesh.is_main:
            shutil.rmtree(folder, ignore_errors=True)
