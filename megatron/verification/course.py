"""Training on the mesh, by the run's own trainer, with what each step does kept for comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from megatron.checkpoint import Checkpoint
from megatron.config import RunConfig
from megatron.data import MicroBatch, Samples, SampleStream
from megatron.parallel.build import build_model, local_tensor
from megatron.parallel.engine import BatchLoss, Engine
from megatron.parallel.mesh import Mesh
from megatron.tokenizer import Tokenizer
from megatron.training.accidents import Accidents
from megatron.training.batch_size import BatchSize
from megatron.training.evaluate import Evaluator
from megatron.training.launch import global_batches
from megatron.training.metrics import Meter
from megatron.training.persistence import fill_model, resume
from megatron.training.place import Place
from megatron.training.saver import Saver
from megatron.training.state import TrainingState
from megatron.training.stop import Stops
from megatron.training.timers import Timers
from megatron.training.trackers import Trackers
from megatron.training.trainer import Trainer


@dataclass(frozen=True)
class MeshStep:
    """A step as this rank sees it: `PlainStep`, but gradients and weights are this rank's parts of them."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class RecordingEngine(Engine):
    """An engine that keeps a copy of the gradients, before they are clipped and after the loss scale is taken off."""

    gradients: dict[str, Tensor]

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], consumed_samples: int, loss_scale: float = 1.0
    ) -> BatchLoss:
        loss = super().forward_backward(micro_batches, consumed_samples, loss_scale)
        self.gradients = {
            part.name: copied(local_tensor(part.parameter.grad)) / loss_scale
            for part in self.model.parts
            if part.parameter.grad is not None
        }
        return loss


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().to("cpu", copy=True)


class NoTokenizer:
    """What a checkpoint asks a tokenizer, and nothing of it."""

    fingerprint = ""

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class Course:
    """A run on the mesh, from initial weights or from `checkpoint`."""

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        samples: Samples,
        mesh: Mesh,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.vocab_size, self.mesh = config, vocab_size, mesh
        training, size = config.training, config.training.global_batch_size
        assert size
        self.model = build_model(config, vocab_size, mesh)
        self.parts = self.model.parts
        fill_model(self.model, config, checkpoint, vocab_size, mesh, _silent)
        state = TrainingState.of(config, self.model, size)
        if checkpoint:
            resume(state, checkpoint, config, vocab_size, _silent)
        self.engine = RecordingEngine(self.model, mesh, seed=training.seed, per_token=training.calculate_per_token_loss)
        trackers = Trackers([])
        self.trainer = Trainer(
            config=config,
            mesh=mesh,
            state=state,
            engine=self.engine,
            batches=global_batches(config, mesh, SampleStream([samples], seed=training.seed, shuffled=True)),
            evaluator=Evaluator(
                engine=self.engine,
                batches={},
                eval_iters=0,
                global_batch_size=size,
                meter=Meter(),
                stops=Stops(),
                place=Place(),
                logging=config.logging,
                trackers=trackers,
                say=_silent,
            ),
            batch_size=BatchSize(size),
            train_iters=training.train_iters or 0,
            flops=lambda lengths: 0.0,
            peak_flops=None,
            stops=Stops(),
            save=None,
            restore=None,
            accidents=Accidents.of(config, is_main=False, say=_silent),
            say=_silent,
            trackers=trackers,
            timers=Timers(config.logging),
        )

    def micro_batches(self) -> list[MicroBatch]:
        """This rank's, of the first step."""
        return self.trainer.batches.batch(0, self.trainer.batch_size.full).micro_batches

    def weights(self) -> dict[str, Tensor]:
        """This rank's parts of them."""
        return {part.name: copied(part.local) for part in self.parts}

    def step(self) -> MeshStep:
        """The next step."""
        report = self.trainer.step()
        loss = report.loss.mean if report.loss else float("nan")
        norm = float("nan") if report.grad_norm is None else report.grad_norm
        return MeshStep(loss, norm, self.engine.gradients, self.weights())

    def save(self, folder: Path) -> None:
        """Write a checkpoint, as a run does."""
        config = replace(self.config, checkpoint=replace(self.config.checkpoint, save=str(folder)))
        tokenizer = cast(Tokenizer, NoTokenizer())
        Saver(config, self.mesh, tokenizer, self.vocab_size, _silent)(self.trainer.state)


def _silent(message: str) -> None:
    """A run within a verification has nothing to say."""
