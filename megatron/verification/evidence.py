"""Everything a verification found, for the probes that look for the cause."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron.config import RunConfig
from megatron.data import Samples
from megatron.parallel.mesh import Mesh
from megatron.verification.checks import gradient_differences
from megatron.verification.course import Course, MeshStep
from megatron.verification.resumption import Resumption
from megatron.verification.rows import LOSS, TOLERANCES, Row
from megatron.verification.yardstick import PlainStep


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was found on the mesh (`course`, `steps`, ...) and plainly, and the table's rows."""

    config: RunConfig
    vocab_size: int
    samples: Samples
    mesh: Mesh
    course: Course
    plain: Sequence[PlainStep]
    steps: Sequence[MeshStep]
    other_packing: MeshStep | None
    resumption: Resumption | None
    rows: Sequence[Row]

    def row(self, check: str) -> Row | None:
        """That of a check, if it was made."""
        return next((row for row in self.rows if row.check == check and not row.left_out), None)

    def fails(self, check: str) -> bool:
        """Whether a check was made and failed."""
        row = self.row(check)
        return row is not None and not row.ok

    @property
    def tolerance(self) -> tuple[float, float]:
        """(of the loss, of gradients)."""
        tolerance = TOLERANCES[self.course.model.compute_dtype]
        return tolerance.loss, tolerance.gradient

    @property
    def loss_is_wrong(self) -> bool:
        """In the first step already."""
        row = self.row(LOSS)
        return row is not None and row.is_wrong_at_first

    def worst(self, differences: Iterable[float]) -> float:
        """The largest over all ranks."""
        return max(rank[0] for rank in self.mesh.gather([max(differences, default=0.0)]))

    def gradient_error(self, gradients: Mapping[str, Tensor]) -> float:
        """How far gradients of the first step, each rank's parts of them, are from the plain ones; over all ranks."""
        return self.worst(gradient_differences(self.course.parts, gradients, self.plain[0]).values())
