"""From a configuration to a run: everything it is made of, built in one readable order."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from megatron.checkpoint import Checkpoint
from megatron.config import RunConfig, TrainingConfig, UsageError
from megatron.data import DataSplits, GlobalBatches, RowOptions, SampleStream, build_splits
from megatron.data.packing import least_micro_batches
from megatron.model import training_flops
from megatron.parallel.build import ParallelModel, build_model
from megatron.parallel.device import peak_tflops, synchronize
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Mesh, leaves_no_group, open_mesh, plan_layout, world_size_of
from megatron.parallel.plan import virtual_stages
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.training.accidents import Accidents
from megatron.training.batch_size import BatchSize, batch_size
from megatron.training.evaluate import Evaluator
from megatron.training.log import main_rank_writer
from megatron.training.metrics import Meter, build_meter
from megatron.training.persistence import fill_model, resume
from megatron.training.place import Place
from megatron.training.restore import Restorer
from megatron.training.saver import Saver
from megatron.training.start import Start, verified
from megatron.training.state import Progress, TrainingState
from megatron.training.stop import Stops, guessed_save_seconds, open_stops
from megatron.training.stored_tokenizers import settle_tokenizer
from megatron.training.timers import Timers
from megatron.training.trackers import Trackers, build_trackers
from megatron.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run works in: what was asked for, the ranks, the data, reasons to stop, and where to speak."""

    start: Start
    mesh: Mesh
    tokenizer: Tokenizer
    splits: DataSplits
    batch_size: BatchSize
    meter: Meter
    vocab_size: int
    say: Callable[[str], None]
    trackers: Trackers
    stops: Stops
    place: Place

    @property
    def config(self) -> RunConfig:
        """What was asked for."""
        return self.start.config

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What `--load` names."""
        return self.start.checkpoint


@leaves_no_group
def run(start: Start, notes: Sequence[str] = ()) -> None:
    """Train, or with `--eval_only` evaluate.

    Args:
        start: what was asked for, and where to start.
        notes: lines for the user, said once.

    Raises:
        UsageError: the options do not fit the number of processes, the data or the checkpoint.
        CommonError: the checkpoint is damaged, and there is no other.
    """
    began, config = time.monotonic(), start.config
    layout = plan_layout(world_size_of(os.environ), config.parallel, config.model)
    sizes = batch_size(config.training, layout.data)
    tokenizer, splits = build_tokenizer(config.tokenizer), build_splits(config.data, config.training.seed)
    meter = build_meter(config.logging.metrics, tokenizer)
    if not config.training.eval_only:
        splits.require("train")
    place = Place(int(os.environ.get("RANK", "0")), world_size_of(os.environ))
    with ExitStack() as stack:
        stack.enter_context(place.told())
        mesh = stack.enter_context(open_mesh(layout, config.parallel))
        stack.enter_context(place.watched(config.parallel.distributed_timeout_minutes * 30, sys.stderr.write))
        say = main_rank_writer(mesh.is_main)
        start = verified(start, mesh)
        checkpoint = start.checkpoint
        for note in [
            *notes,
            *start.notes,
            *(checkpoint.warnings if checkpoint else ()),
            *settle_tokenizer(config.data, checkpoint, tokenizer),
        ]:
            say(note)
        trackers = build_trackers(config.logging, say, config.to_dict()) if mesh.is_main else Trackers([])
        stack.callback(trackers.close)
        setting = Setting(
            start=start,
            mesh=mesh,
            tokenizer=tokenizer,
            splits=splits,
            batch_size=sizes,
            meter=meter,
            vocab_size=max(tokenizer.vocab_size, checkpoint.vocab_size if checkpoint else 0),
            say=say,
            trackers=trackers,
            stops=stack.enter_context(open_stops(config.training, began, mesh.any)),
            place=place,
        )
        _run(setting)


def _run(setting: Setting) -> None:
    config, checkpoint = setting.config, setting.checkpoint
    with setting.place("loading"):
        model = build_model(config, setting.vocab_size, setting.mesh)
        fill_model(model, config, checkpoint, setting.vocab_size, setting.mesh, setting.say)
        setting.mesh.barrier()
    setting.say(_description(setting, model))
    training = config.training
    engine = Engine(model, setting.mesh, seed=training.seed, per_token=training.calculate_per_token_loss)
    evaluator = _evaluator(setting, engine)
    if training.eval_only:
        evaluator.evaluate_all(Progress(checkpoint.iteration if checkpoint else 0))
        return
    trainer = _trainer(setting, model, engine, evaluator)
    if trainer.train() is None:
        evaluator.evaluate_all(trainer.state.progress)


def row_options(config: RunConfig, mesh: Mesh, pad_id: int = 0) -> RowOptions:
    """How the samples of a run become rows on this layout."""
    data, training, stages = config.data, config.training, mesh.size("pp")
    assert data.seq_length and training.micro_batch_size
    return RowOptions(
        micro_batch_size=training.micro_batch_size,
        seq_length=data.seq_length,
        variable_seq_lengths=data.variable_seq_lengths,
        pad_id=pad_id,
        row_multiple=mesh.size("tp"),
        least_micro_batches=least_micro_batches(stages),
    )


def global_batches(
    config: RunConfig, mesh: Mesh, stream: SampleStream, *, pad_id: int = 0, prefetching: bool = False
) -> GlobalBatches:
    """The global batches of a run on this layout."""
    assert config.data.packing
    return GlobalBatches(
        stream=stream,
        rows=row_options(config, mesh, pad_id),
        packing=config.data.packing,
        data_parallel_rank=mesh.rank("dp"),
        data_parallel_size=mesh.size("dp"),
        prefetching=prefetching,
    )


def _batches(setting: Setting, stream: SampleStream, *, prefetching: bool = False) -> GlobalBatches:
    pad_id = setting.tokenizer.pad_id or 0
    return global_batches(setting.config, setting.mesh, stream, pad_id=pad_id, prefetching=prefetching)


def _evaluator(setting: Setting, engine: Engine) -> Evaluator:
    evaluated = {"validation": setting.splits.valid, "test": setting.splits.test}
    return Evaluator(
        engine=engine,
        batches={
            name: {which: _batches(setting, stream) for which, stream in split.apart().items()}
            for name, split in evaluated.items()
            if split
        },
        eval_iters=setting.config.training.eval_iters,
        global_batch_size=setting.batch_size.full,
        meter=setting.meter,
        stops=setting.stops,
        place=setting.place,
        logging=setting.config.logging,
        trackers=setting.trackers,
        say=setting.say,
    )


def _trainer(setting: Setting, model: ParallelModel, engine: Engine, evaluator: Evaluator) -> Trainer:
    config, mesh, say, sizes = setting.config, setting.mesh, setting.say, setting.batch_size
    training, stream = config.training, setting.splits.require("train").blended(config.training.seed)
    peak = config.logging.peak_tflops or peak_tflops(mesh.device, model.compute_dtype)
    state = TrainingState.of(config, model, sizes.full)
    if setting.start.resumes:
        assert setting.checkpoint
        resume(state, setting.checkpoint, config, setting.vocab_size, say)
        say(f"going on from iteration {state.progress.iteration}, {state.progress.consumed_samples} consumed samples")
    if config.checkpoint.save:
        setting.stops.pace.save = guessed_save_seconds(sum(part.local.nbytes for part in model.parts))
    saver = Saver(config, mesh, setting.tokenizer, setting.vocab_size, say) if config.checkpoint.save else None
    if saver:
        saver.prepare(model)
    return Trainer(
        config=config,
        mesh=mesh,
        state=state,
        engine=engine,
        batches=_batches(setting, stream, prefetching=config.data.num_workers > 0),
        evaluator=evaluator,
        batch_size=sizes,
        train_iters=_train_iters(training, state.progress, sizes),
        flops=partial(training_flops, config.model, setting.vocab_size),
        peak_flops=peak * 1e12 if peak else None,
        stops=setting.stops,
        save=saver,
        restore=Restorer(setting.start, mesh, saver, setting.vocab_size, say) if saver else None,
        accidents=Accidents.of(config, is_main=mesh.is_main, say=say),
        say=say,
        trackers=setting.trackers,
        timers=Timers(config.logging, synchronize=partial(synchronize, mesh.device)),
        place=setting.place,
    )


def _train_iters(training: TrainingConfig, progress: Progress, sizes: BatchSize) -> int:
    """The last iteration; samples that are still to be consumed are counted in batches of today's size."""
    if training.train_iters:
        return training.train_iters
    assert training.train_samples
    remaining = sizes.iterations(progress.consumed_samples, training.train_samples)
    if not progress.iteration and not remaining:
        raise UsageError(f"--train_samples {training.train_samples} is less than the first batch, {sizes.at(0)}")
    return progress.iteration + remaining


def _description(setting: Setting, model: ParallelModel) -> str:
    """What will run, in a few lines."""
    mesh = setting.mesh
    own = sum(torch.Size(part.shape).numel() for part in model.parts if part.other_stage != 0)
    parameters = int(mesh.sum([float(own)], "pp")[0])
    return "\n".join(
        [
            f"{setting.config.model.model_name}: {parameters:,} parameters, vocabulary {setting.vocab_size:,}, "
            f"{str(model.compute_dtype).removeprefix('torch.')}, {model.kernel}"
            f"{', layers compiled' if setting.config.kernel.compile else ''}",
            f"{mesh}; global batch {setting.batch_size.full} samples",
            *_stages(setting),
            *_samples(setting.splits),
        ]
    )


def _stages(setting: Setting) -> list[str]:
    """Which layers each stage of a pipeline has."""
    stages, layers = setting.mesh.size("pp"), setting.config.model.num_layers
    assert layers
    chunks = virtual_stages(setting.config.parallel, layers)
    held = [" and ".join(map(_numbers, chunks[stage::stages])) for stage in range(stages)]
    return [f"pipeline stages: layers {'; '.join(held)}"] if stages > 1 else []


def _numbers(layers: range) -> str:
    """Of layers, for a reader."""
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else str(layers.start)


def _samples(splits: DataSplits) -> list[str]:
    """How many samples each split has, and what there is to know of those to train on."""
    counts = {"train": splits.train, "validation": splits.valid, "test": splits.test}
    lines = ["samples: " + ", ".join(f"{len(split) if split else 0:,} {name}" for name, split in counts.items())]
    train = splits.train
    if not train:
        return lines
    if len(train.datasets) > 1:
        shares, total = zip(train.datasets, train.weights, strict=True), sum(train.weights)
        lines += [f"blend: {float(weight / total):.2%} {data.name} ({len(data):,} samples)" for data, weight in shares]
    return lines + train.notes
