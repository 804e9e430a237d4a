"""A run's state as checkpoint slices, and back: weights and optimizer state by parameter, each rank its own part."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import Checkpoint, Slice, TensorStore, with_vocabulary
from megatron.checkpoint.vocabulary import ResizedVocabulary
from megatron.config import RunConfig, UsageError
from megatron.model.initialization import initial_weight
from megatron.parallel.build import ParallelModel, Part, local_tensor
from megatron.parallel.mesh import Mesh
from megatron.training.state import Progress, TrainingState

Say = Callable[[str], None]
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""`--optimizer` -> the tensors it keeps of each parameter, in its own order: files of equal states are equal."""
OF_A_RUN = ("consumed_samples", "schedule", "loss_scale", "optimizer_steps")
"""What a checkpoint says of the run, besides its options."""


def fill_model(
    model: ParallelModel, config: RunConfig, checkpoint: Checkpoint | None, vocab_size: int, mesh: Mesh, say: Say
) -> None:
    """Give the model its weights: initial ones, or the checkpoint's with its vocabulary grown to `vocab_size`."""
    if checkpoint is None:
        seed = config.training.seed
        model.fill(lambda name, shape, ranges: initial_weight(name, shape, config.model, seed)[ranges])
        return
    if vocab_size > checkpoint.vocab_size:
        say(
            f"the tokenizer has {vocab_size} tokens, the checkpoint {checkpoint.vocab_size}: "
            f"{vocab_size - checkpoint.vocab_size} new rows, each the mean of the old ones"
        )
    model.fill(reader(with_vocabulary(checkpoint.weights, vocab_size)))
    checkpoint.close()


def resume(state: TrainingState, checkpoint: Checkpoint, config: RunConfig, vocab_size: int, say: Say) -> None:
    """Go on from a training checkpoint: progress, schedule, and with `load_optim` the optimizer and loss scale.

    The model's vocabulary has `vocab_size` rows.

    Raises:
        UsageError: the schedule or the optimizer contradicts the checkpoint's.
        ValueError: the checkpoint does not say where the run stood.
    """
    options, stored = config.schedule, checkpoint.run
    missing = [name for name in OF_A_RUN if name not in stored]
    if missing:
        raise ValueError(f"{checkpoint.folder / 'run.json'} has no {', '.join(missing)}: it is of no training run")
    try:
        state.progress = Progress.restored(checkpoint.iteration, stored)
        state.schedule = state.schedule.merged_with(
            stored["schedule"], options.override_opt_param_scheduler, options.use_checkpoint_opt_param_scheduler
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{checkpoint.folder / 'run.json'} does not say where a run stood: {error!r}") from error
    if not config.checkpoint.load_optim:
        return
    state.loss_scale.load_state_dict(stored["loss_scale"])
    if checkpoint.optimizer is None:
        say(f"{checkpoint.folder} has no optimizer state: the optimizer starts anew")
        return
    grown = ResizedVocabulary(checkpoint.optimizer, vocab_size, as_mean=False)
    keys = STATES[config.optimizer.optimizer]
    if set(keys) != {name.partition(".")[0] for name in grown.names()}:
        raise UsageError(
            f"--optimizer {config.optimizer.optimizer} is not the one of {checkpoint.folder}; "
            "start its state anew by --no_load_optim"
        )
    load_optimizer(state.model, state.optimizer, grown, keys, stored["optimizer_steps"])
    checkpoint.close()


def model_slices(model: ParallelModel) -> Iterator[Slice]:
    """The weights this rank writes."""
    for part in _written(model.parts):
        yield _slice(part.name, part, part.local)


def optimizer_slices(model: ParallelModel, optimizer: torch.optim.Optimizer) -> Iterator[Slice]:
    """The optimizer state this rank writes: `exp_avg.NAME`, `exp_avg_sq.NAME` or `momentum_buffer.NAME`."""
    for part in _written(model.parts):
        for key, value in optimizer.state.get(part.parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                yield _slice(f"{key}.{part.name}", part, local_tensor(value))


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps Adam's bias correction has counted; 0 for an optimizer without one."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


@torch.no_grad()
def load_optimizer(
    model: ParallelModel, optimizer: torch.optim.Optimizer, stored: TensorStore, keys: Iterable[str], steps: int
) -> None:
    """Fill the optimizer's state, the tensors `keys` of each parameter, from a checkpoint of any layout."""
    for part in model.parts:
        state: dict[str, Any] = {key: torch.zeros_like(part.parameter) for key in keys}
        for key, value in state.items():
            local_tensor(value).copy_(stored.read(f"{key}.{part.name}", part.ranges))
        if "exp_avg" in state:
            state["step"] = torch.tensor(float(steps), device=part.local.device)
        optimizer.state[part.parameter] = state


def reader(stored: TensorStore) -> Callable[[str, tuple[int, ...], tuple[slice, ...]], Tensor]:
    """`ParallelModel.fill`'s way to read `stored`."""

    def read(name: str, shape: tuple[int, ...], ranges: tuple[slice, ...]) -> Tensor:
        if tuple(stored.shape(name)) != shape:
            raise ValueError(f"{name} is {list(stored.shape(name))} in the checkpoint, but the model has {list(shape)}")
        return stored.read(name, ranges)

    return read


def _written(parts: Sequence[Part]) -> Iterator[Part]:
    return (part for part in parts if part.is_primary and part.local.numel())


def _slice(name: str, part: Part, tensor: Tensor) -> Slice:
    return Slice.of(name, part.shape, tuple(r.start for r in part.ranges), tensor)
