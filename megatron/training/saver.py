"""Writing a run's checkpoints: at once, or in the background while training goes on."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron.checkpoint import Ranks, Save, Slice, begin_checkpoint, prune
from megatron.config import RunConfig
from megatron.parallel.build import ParallelModel
from megatron.parallel.device import host_copy, host_memory, synchronize
from megatron.parallel.mesh import Mesh
from megatron.tokenizer import Tokenizer
from megatron.training.persistence import STATES, model_slices, optimizer_slices, optimizer_steps
from megatron.training.state import TrainingState

R = TypeVar("R")


@dataclass(frozen=True)
class Begun:
    """A checkpoint that is being written: what, of which iteration, this rank's part, and since when."""

    save: Save
    iteration: int
    written: "Future[None]"
    start: float


@dataclass
class Saver:
    """Writes checkpoints of a run to `--save`; every rank calls it, and its methods, together.

    With `--async_save` a call returns when the state is copied; the checkpoint becomes visible in a later call, in
    `finish_if_written` or `finish`. A failure is raised there, on every rank, and leaves earlier checkpoints alone.

    Attributes:
        seconds: that the latest whole checkpoint took, from its beginning on.
    """

    config: RunConfig
    mesh: Mesh
    tokenizer: Tokenizer
    vocab_size: int
    say: Callable[[str], None]
    seconds: float | None = None
    _waited: float = 0.0
    _begun: Begun | None = None
    _pruned: "Future[list[str]] | None" = None
    _copies: "Future[dict[str, Tensor]] | None" = None

    def prepare(self, model: ParallelModel) -> None:
        """With `--async_save`, take the memory for copies of the state while training begins, which takes a while."""
        options = self.config.optimizer
        if self.config.checkpoint.async_save:
            has_state = self.config.checkpoint.save_optim and (options.optimizer != "sgd" or options.sgd_momentum)
            keys = STATES[options.optimizer] if has_state else ()
            self._copies = _started(partial(_memory, model, keys), in_background=True, is_awaited=True)

    def __call__(self, state: TrainingState) -> None:
        """Write the checkpoint of the present iteration; the one before is finished first."""
        self.finish()
        start, in_background = time.perf_counter(), self.config.checkpoint.async_save
        save, iteration = self._begin(state), state.progress.iteration
        self._begun = Begun(save, iteration, _started(save.write, in_background=in_background), start)
        self._waited = time.perf_counter() - start
        if in_background:
            self.say(f"saving checkpoint of iteration {iteration} in the background")
        else:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint was begun that is not whole yet."""
        return self._begun is not None

    def finish_if_written(self) -> None:
        """Make the checkpoint in the background visible, if there is one and every rank has written its part."""
        if not self._begun:
            return
        start, written = time.perf_counter(), self._begun.written
        is_written = written.done()
        has_failed = is_written and written.exception() is not None
        outstanding, failed = self.mesh.sum([float(not is_written), float(has_failed)])
        if failed or not outstanding:
            self._publish(self._begun)
        else:
            self._waited += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is whole, if there is one, and those not kept are gone.

        Raises:
            OSError: it could not be written.
        """
        if self._begun:
            self._publish(self._begun)
        if self._pruned:
            for problem in self._pruned.result():
                self.say(problem)
            self._pruned = None

    def _publish(self, begun: Begun) -> None:
        self._begun = None
        start, options = time.perf_counter(), self.config.checkpoint
        folder = begun.save.finish(begun.written.exception())
        end = time.perf_counter()
        self.seconds = end - begun.start
        waited = f", of which training waited {self._waited + end - start:.2f} s" if options.async_save else ""
        self.say(f"saved checkpoint of iteration {begun.iteration} to {folder} in {self.seconds:.2f} s{waited}")
        if options.keep_last and self.mesh.is_main:
            work = partial(prune, folder.parent, begun.iteration, options.keep_last, options.keep_every)
            self._pruned = _started(work, in_background=options.async_save)

    def _begin(self, state: TrainingState) -> Save:
        options, rank = self.config.checkpoint, torch.distributed.get_rank()
        assert options.save
        files: dict[str, Iterable[Slice]] = {f"model/rank-{rank:05d}.safetensors": model_slices(state.model)}
        if options.save_optim:
            files[f"optimizer/rank-{rank:05d}.safetensors"] = optimizer_slices(state.model, state.optimizer)
        if options.async_save:
            if not self._copies:
                self.prepare(state.model)
            assert self._copies
            copies = self._copies.result()
            files = {name: [_copied(part, copies[part.name]) for part in slices] for name, slices in files.items()}
            synchronize(self.mesh.device)
        return begin_checkpoint(
            Path(options.save),
            state.progress.iteration,
            self._description(state),
            files,
            self.tokenizer,
            ranks=Ranks(rank, self.mesh.ranks.size(), lambda value: self.mesh.sum([value])[0]),
        )

    def _description(self, state: TrainingState) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            **state.progress.to_dict(),
            "vocab_size": self.vocab_size,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "optimizer_steps": optimizer_steps(state.optimizer),
            "schedule": state.schedule.to_dict(),
            "loss_scale": state.loss_scale.state_dict(),
            "versions": {name: version(name) for name in ("megatron-llm", "torch")},
        }


def _memory(model: ParallelModel, keys: Iterable[str]) -> dict[str, Tensor]:
    """For a copy of each slice that this rank writes, by name; `keys` are the optimizer's."""
    return {
        name: host_memory(part.read())
        for part in model_slices(model)
        for name in (part.name, *(f"{key}.{part.name}" for key in keys))
    }


def _copied(part: Slice, memory: Tensor) -> Slice:
    """A slice that training does not change."""
    copy = host_copy(part.read(), memory)
    return replace(part, read=lambda: copy)


def _started(work: Callable[[], R], *, in_background: bool, is_awaited: bool = False) -> "Future[R]":
    """Do `work` here, or in a thread. A process that ends for another reason does not wait for it, unless `is_awaited`.

    It has to wait where PyTorch works in the thread: the end of the interpreter would be an abort.
    """
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if in_background:
        threading.Thread(target=run, name="checkpoint", daemon=not is_awaited).start()
    else:
        run()
    return future
