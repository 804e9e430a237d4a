"""From a configuration to a run: everything it is made of, built in one readable order."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from megatron.checkpoint import Checkpoint, changed_files
from megatron.config import RunConfig, TrainingConfig, UsageError
from megatron.data import DataSplit, DataSplits, InstructionBatches, RowOptions, build_instruction_splits
from megatron.data.instruction import tokenizer_file
from megatron.model import training_flops
from megatron.optim.groups import build_optimizer
from megatron.optim.loss_scale import build_loss_scale
from megatron.optim.schedule import ParameterSchedule
from megatron.parallel.build import ParallelModel, build_model
from megatron.parallel.device import peak_tflops, synchronize
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Mesh, leaves_no_group, open_mesh, plan_layout, world_size_of
from megatron.parallel.plan import virtual_stages
from megatron.tokenizer import Tokenizer, build_tokenizer, difference, read_description
from megatron.tokenizer.description import SPECIAL_TOKENS_FILE
from megatron.training.batch_size import BatchSize, batch_size
from megatron.training.evaluate import Evaluator
from megatron.training.log import main_rank_writer
from megatron.training.persistence import Saver, fill_model, resume
from megatron.training.state import Progress, TrainingState
from megatron.training.stop import StopOnSignal, build_stops
from megatron.training.timers import Timers
from megatron.training.trackers import Trackers, build_trackers
from megatron.training.trainer import Trainer

MICRO_BATCHES_A_STAGE = 4
"""A packed batch has so many for each pipeline stage if it can: less than a fifth of the time is then idle."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run works in: what was asked for, the ranks, the data, and where to speak."""

    config: RunConfig
    checkpoint: Checkpoint | None
    mesh: Mesh
    tokenizer: Tokenizer
    splits: DataSplits
    batch_size: BatchSize
    vocab_size: int
    say: Callable[[str], None]
    trackers: Trackers

    @property
    def resumes(self) -> bool:
        """Whether the run goes on where a training checkpoint stopped."""
        return bool(self.checkpoint and self.checkpoint.iteration and not self.config.checkpoint.finetune)


@leaves_no_group
def run(config: RunConfig, checkpoint: Checkpoint | None, notes: Sequence[str] = ()) -> None:
    """Train, or with `--eval_only` evaluate, as `config` says.

    Args:
        config: what was asked for.
        checkpoint: what `--load` names.
        notes: lines for the user, said once.

    Raises:
        UsageError: the options do not fit the number of processes, the data or the checkpoint.
    """
    layout = plan_layout(world_size_of(os.environ), config.parallel, config.model)
    sizes = batch_size(config.training, layout.data)
    tokenizer, splits = build_tokenizer(config.tokenizer), build_instruction_splits(config.data)
    if not config.training.eval_only:
        splits.require("train")
    with ExitStack() as stack:
        mesh = stack.enter_context(open_mesh(layout, config.parallel.distributed_backend))
        say = main_rank_writer(mesh.is_main)
        for note in [
            *notes,
            *(checkpoint.warnings if checkpoint else ()),
            *_other_tokenizers(config, checkpoint, tokenizer),
        ]:
            say(note)
        trackers = build_trackers(config.logging, say, config.to_dict()) if mesh.is_main else Trackers([])
        stack.callback(trackers.close)
        setting = Setting(
            config=config,
            checkpoint=checkpoint,
            mesh=mesh,
            tokenizer=tokenizer,
            splits=splits,
            batch_size=sizes,
            vocab_size=max(tokenizer.vocab_size, checkpoint.vocab_size if checkpoint else 0),
            say=say,
            trackers=trackers,
        )
        on_signal = stack.enter_context(StopOnSignal()) if config.training.exit_signal_handler else None
        _run(setting, on_signal)


def _other_tokenizers(config: RunConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> list[str]:
    """Lines that say in what the tokenizer differs from that of the checkpoint and those of the data."""
    data = config.data
    paths = [data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path]
    files = {f"the data {prefix}": tokenizer_file(prefix) for prefix in dict.fromkeys(chain(*(p or () for p in paths)))}
    if checkpoint and checkpoint.tokenizer_folder:
        files[f"the checkpoint {checkpoint.folder}"] = checkpoint.tokenizer_folder / SPECIAL_TOKENS_FILE
    found = {
        what: difference(read_description(file.parent, file.name), tokenizer)
        for what, file in files.items()
        if file.is_file()
    }
    return [f"warning: the tokenizer is not that of {what}: {change}" for what, change in found.items() if change]


def _run(setting: Setting, on_signal: StopOnSignal | None) -> None:
    config, checkpoint = setting.config, setting.checkpoint
    _verify(setting)
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
    trainer = _trainer(setting, model, engine, evaluator, on_signal)
    if trainer.train() is None:
        evaluator.evaluate_all(trainer.state.progress)


def _verify(setting: Setting) -> None:
    """Stop, all ranks alike, if a file of the checkpoint is not what was written; each rank reads its share of them."""
    checkpoint, mesh = setting.checkpoint, setting.mesh
    if not checkpoint:
        return
    needed = ("model/", "optimizer/") if setting.resumes and setting.config.checkpoint.load_optim else ("model/",)
    changed = changed_files(checkpoint.folder, needed, mesh.ranks.get_rank(), mesh.ranks.size())
    if mesh.any(bool(changed)):
        names = ", ".join(map(str, changed)) or "another rank names the file"
        raise ValueError(f"checkpoint {checkpoint.folder} was changed after it was written: {names}")


def row_options(config: RunConfig, mesh: Mesh, pad_id: int = 0) -> RowOptions:
    """How the samples of a run become rows on this layout."""
    data, training, stages = config.data, config.training, mesh.size("pp")
    assert data.seq_length and training.micro_batch_size
    return RowOptions(
        micro_batch_size=training.micro_batch_size,
        seq_length=data.seq_length,
        variable_seq_lengths=data.variable_seq_lengths,
        scalar_loss_mask=data.scalar_loss_mask,
        pad_id=pad_id,
        row_multiple=mesh.size("tp"),
        least_micro_batches=MICRO_BATCHES_A_STAGE * stages if stages > 1 else 1,
    )


def _batches(setting: Setting, split: DataSplit, *, shuffled: bool) -> InstructionBatches:
    data, mesh = setting.config.data, setting.mesh
    assert data.packing
    return InstructionBatches(
        dataset=split.dataset,
        indices=split.indices,
        rows=row_options(setting.config, mesh, setting.tokenizer.pad_id or 0),
        packing=data.packing,
        data_parallel_rank=mesh.rank("dp"),
        data_parallel_size=mesh.size("dp"),
        seed=setting.config.training.seed,
        shuffled=shuffled,
        prefetching=shuffled and data.num_workers > 0,
    )


def _evaluator(setting: Setting, engine: Engine) -> Evaluator:
    evaluated = {"validation": setting.splits.valid, "test": setting.splits.test}
    return Evaluator(
        engine=engine,
        batches={name: _batches(setting, split, shuffled=False) for name, split in evaluated.items() if split},
        eval_iters=setting.config.training.eval_iters,
        global_batch_size=setting.batch_size.full,
        logging=setting.config.logging,
        trackers=setting.trackers,
        say=setting.say,
    )


def _trainer(
    setting: Setting, model: ParallelModel, engine: Engine, evaluator: Evaluator, on_signal: StopOnSignal | None
) -> Trainer:
    config, mesh, say, sizes = setting.config, setting.mesh, setting.say, setting.batch_size
    training = config.training
    peak = config.logging.peak_tflops or peak_tflops(mesh.device, model.compute_dtype)
    state = TrainingState(
        model,
        build_optimizer(model.chunks, config.optimizer),
        ParameterSchedule(config.optimizer, config.schedule, training, sizes.full),
        build_loss_scale(config.precision),
    )
    if setting.resumes:
        assert setting.checkpoint
        resume(state, setting.checkpoint, config, setting.vocab_size, say)
        say(f"going on from iteration {state.progress.iteration}, {state.progress.consumed_samples} consumed samples")
    return Trainer(
        config=config,
        mesh=mesh,
        state=state,
        engine=engine,
        batches=_batches(setting, setting.splits.require("train"), shuffled=True),
        evaluator=evaluator,
        batch_size=sizes,
        train_iters=_train_iters(training, state.progress, sizes),
        flops=partial(training_flops, config.model, setting.vocab_size),
        peak_flops=peak * 1e12 if peak else None,
        stops=build_stops(training, on_signal),
        save=Saver(config, mesh, setting.tokenizer, setting.vocab_size, say),
        say=say,
        trackers=setting.trackers,
        timers=Timers(config.logging, synchronize=partial(synchronize, mesh.device)),
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
    mesh, splits = setting.mesh, setting.splits
    own = sum(torch.Size(part.shape).numel() for part in model.parts if part.other_stage != 0)
    parameters = int(mesh.sum([float(own)], "pp")[0])
    counts = {"train": splits.train, "validation": splits.valid, "test": splits.test}
    rows = ", ".join(f"{len(split.indices) if split else 0:,} {name}" for name, split in counts.items())
    return "\n".join(
        [
            f"{setting.config.model.model_name}: {parameters:,} parameters, vocabulary {setting.vocab_size:,}, "
            f"{str(model.compute_dtype).removeprefix('torch.')}, {model.kernel}",
            f"{mesh}; global batch {setting.batch_size.full} samples",
            *_stages(setting),
            f"rows: {rows}",
            *_long_samples(setting),
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


def _long_samples(setting: Setting) -> list[str]:
    """How many training rows are too long, where there are any."""
    train, length = setting.splits.train, setting.config.data.seq_length
    assert length
    if train and train.dropped:
        return [f"{train.dropped:,} training rows are longer than --seq_length {length} and are left out"]
    longer = int((train.dataset.lengths[train.indices] > length + 1).sum()) if train else 0
    return [f"{longer:,} training rows are longer than --seq_length {length} and are cut off there"] if longer else []
