"""Back to the last checkpoint, without leaving the run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.checkpoint import open_checkpoint
from megatron.parallel.mesh import Mesh
from megatron.training.persistence import fill_model, resume
from megatron.training.saver import Saver
from megatron.training.start import Start, verified
from megatron.training.state import TrainingState


@dataclass(frozen=True)
class Restorer:
    """Gives a run the state of its last checkpoint back; every rank calls it together.

    Attributes:
        start: what the run started from, which is the last checkpoint until there is another in `--save`.
        saver: wrote that.
    """

    start: Start
    mesh: Mesh
    saver: Saver
    vocab_size: int
    say: Callable[[str], None]

    def __call__(self, state: TrainingState) -> None:
        """Make `state` what it was at `saved_iteration`.

        Raises:
            ValueError: that checkpoint is damaged.
        """
        self.saver.finish()
        start = verified(self._last(state.progress.saved_iteration), self.mesh)
        assert start.checkpoint
        fill_model(state.model, start.config, start.checkpoint, self.vocab_size, self.mesh, self.say)
        state.optimizer.state.clear()  # a checkpoint from before the first step has nothing to replace it
        resume(state, start.checkpoint, start.config, self.vocab_size, self.say)

    def _last(self, iteration: int | None) -> Start:
        """What the run began with, taken as its flags say, while that is the last checkpoint; else all it saved."""
        start, options = self.start, self.start.config.checkpoint
        if start.resumes and start.checkpoint and start.checkpoint.iteration == iteration:
            return start
        assert options.save
        place = {"load": options.save, "load_iters": iteration}
        takes_all = replace(options, load=options.save, load_iters=iteration, finetune=False, load_optim=True)
        return replace(
            start,
            typed={**start.typed, **place},
            config=replace(start.config, checkpoint=takes_all),
            checkpoint=open_checkpoint(Path(options.save), iteration),
        )
