"""Our model on the layout of a run beside Hugging Face's own: logits and loss of the same rows of data."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron.checkpoint import Checkpoint
from megatron.checkpoint.json_file import read_json
from megatron.checkpoint.load import HF_CONFIG
from megatron.config import RunConfig, UsageError
from megatron.config.resolve import MEANINGS, SHAPES, flag_of
from megatron.data import MicroBatch, Sample, build_splits
from megatron.data.batch import ignored_rows
from megatron.data.plan import LAYOUTS
from megatron.hf.config import model_fields, vocabulary_size
from megatron.hf.hub import model_folder
from megatron.parallel.build import build_model
from megatron.parallel.engine import Engine
from megatron.parallel.logits import hidden_states, whole_logits
from megatron.parallel.mesh import leaves_no_group, open_mesh, plan_layout, world_size_of
from megatron.parallel.plan import virtual_stages
from megatron.training.launch import row_options
from megatron.training.log import main_rank_writer
from megatron.training.persistence import fill_model
from megatron.verification.hugging_face import HuggingFaceModel
from megatron.verification.logit_rows import (
    TOLERANCES,
    RowDifference,
    Tolerance,
    compare_row,
    layer_differences,
    report_layers,
    report_rows,
)

SUPPLIED = {"micro_batch_size": 1, "packing": "padding_free", "data_type": "instruction"}
"""What a run needs, where it is not given."""
MOST_RANDOM_TOKENS = 512
"""Of a row without data, whose logits two models hold in fp32."""
FIXED = {"eval_only": True, "calculate_per_token_loss": True}
"""What every comparison has."""


@dataclass(frozen=True)
class Theirs:
    """The model to compare with.

    Attributes:
        name: its folder, or its name on the hub.
        cache: where models from the hub are kept.
        dtype: name of the precision it computes in.
        device: where it computes; None: where the main rank does.
    """

    name: str
    cache: str | None = None
    dtype: str = "float32"
    device: str | None = None


class Share(NamedTuple):
    """What one data-parallel rank computes in one pass: numbers of the samples, and the micro batch they make."""

    numbers: Sequence[int]
    rows: MicroBatch


def compared_flags(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a comparison, ready for `resolve_run`: the typed ones, and what a run needs besides."""
    return {**SUPPLIED, **typed, **FIXED}


@leaves_no_group
def verify_correctness(
    config: RunConfig, checkpoint: Checkpoint, theirs: Theirs, *, rows: int, tolerance: float | None = None
) -> bool:
    """Whether `checkpoint` on the layout of `config` computes what Hugging Face's model does; the main rank says so.

    Args:
        config: of a run; its data are compared on, or without any random tokens.
        checkpoint: ours.
        theirs: what it is compared with.
        rows: how many of the first rows of the data.
        tolerance: the largest error of a logit; by default as the precision has it.

    Raises:
        UsageError: the layout does not fit the number of processes, or the two are models of different sizes.
        ValueError: Hugging Face's model cannot be read.
    """
    layout = plan_layout(world_size_of(os.environ), config.parallel, config.model)
    folder = model_folder(theirs.name, theirs.cache)
    differing = _differing_settings(config, checkpoint, folder)
    samples, source = read_samples(config, rows, checkpoint.vocab_size)
    with open_mesh(layout, config.parallel) as mesh:
        say = main_rank_writer(mesh.is_main)
        for warning in checkpoint.warnings:
            say(warning)
        model = build_model(config, checkpoint.vocab_size, mesh)
        fill_model(model, config, checkpoint, checkpoint.vocab_size, mesh, say)
        engine = Engine(model, mesh, seed=config.training.seed)
        precision = str(model.compute_dtype).removeprefix("torch.")
        say(
            f"{mesh}; packing {config.data.packing}, {model.kernel}\n"
            f"ours:   {checkpoint.folder}, {config.model.model_name} in {precision}"
        )
        other = None
        if mesh.is_main:
            other = HuggingFaceModel(folder, getattr(torch, theirs.dtype), torch.device(theirs.device or mesh.device))
        say(f"theirs: {folder}, {other}\n{source}\n")
        comparison = Comparison(
            config=config,
            samples=samples,
            vocab_size=checkpoint.vocab_size,
            engine=engine,
            theirs=other,
            tolerance=TOLERANCES[model.compute_dtype].with_logits(tolerance),
            say=say,
        )
        agrees = comparison.run()
        if not agrees:
            for line in differing:
                say(line)
            if model.compute_dtype != torch.float32:
                say("in half precision rounding may hide where it begins: repeat it without --bf16 and --fp16")
        return agrees


def _differing_settings(config: RunConfig, checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Settings that say another thing of the two models, a line each.

    Raises:
        UsageError: they cannot be compared.
    """
    source = folder / HF_CONFIG
    described = read_json(source)
    fields, rows = model_fields(described, source), vocabulary_size(described, source)
    sizes = {
        "rows of the vocabulary": (checkpoint.vocab_size, rows),
        "layers": (config.model.num_layers, fields["num_layers"]),
        "channels of the hidden state": (config.model.hidden_size, fields["hidden_size"]),
    }
    for what, (ours, theirs) in sizes.items():
        if ours != theirs:
            raise UsageError(
                f"{checkpoint.folder} has {ours} {what}, {folder} has {theirs}; give the model it comes from"
            )
    pairs = {name: (getattr(config.model, name), fields[name]) for name in (*SHAPES, *MEANINGS) if name in fields}
    return [
        f"  {flag_of(name)} is {ours} in our model and {theirs} in theirs"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def read_samples(config: RunConfig, count: int, vocab_size: int) -> tuple[list[Sample], str]:
    """The first `count` samples of the data with something to predict, or random ones; and a line that says which.

    Ids beyond the vocabulary, as of special tokens that the model never had, become 0.
    """
    data = config.data
    assert data.seq_length
    if not (data.data_path or data.train_data_path or data.valid_data_path or data.test_data_path):
        random = np.random.default_rng(config.training.seed)
        longest = min(data.seq_length, MOST_RANDOM_TOKENS)
        lengths = random.integers(longest // 2, longest + 1, count) + 1
        samples = [Sample(random.integers(0, vocab_size, n), np.ones(n - 1, np.float32)) for n in lengths.clip(2)]
        return samples, f"{count} rows of up to {longest} random tokens (no --data_path)"
    splits = build_splits(data, config.training.seed)
    dataset = next(split for split in (splits.train, splits.valid, splits.test) if split).datasets[0]
    numbers = np.flatnonzero(dataset.lengths(np.arange(len(dataset))) > 1)[:count]
    if not len(numbers):
        raise ValueError(f"{dataset.name} has no row of two tokens")
    rows = [dataset[int(number)] for number in numbers]
    strange = sum(int((row.tokens >= vocab_size).sum()) for row in rows)
    line = f"{len(rows)} rows of {dataset.name}, cut off at {data.seq_length} tokens"
    if strange:
        line += f"; {strange} tokens beyond the vocabulary of {vocab_size} became 0"
    return [Sample(np.where(row.tokens < vocab_size, row.tokens, 0), row.weights) for row in rows], line


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The two models and the rows. All ranks make the same calls; `theirs` is on the main rank only."""

    config: RunConfig
    samples: Sequence[Sample]
    vocab_size: int
    engine: Engine
    theirs: HuggingFaceModel | None
    tolerance: Tolerance
    say: Callable[[str], None]

    def run(self) -> bool:
        """Compare, report, and where they differ look for the layer."""
        mesh, rounds = self.engine.mesh, self.rounds()
        loss = self.engine.evaluate([shares[mesh.rank("dp")].rows for shares in rounds]).mean
        rows = [row for shares in rounds for row in self._compare(shares)]
        failed = False
        if mesh.is_main:
            text, passes = report_rows(rows, loss, self.tolerance)
            self.say(text)
            failed = not passes
        if not mesh.any(failed):
            return True
        worst = max(rows, key=lambda row: row.largest).number if rows else 0
        self._find_layer(rounds, int(mesh.sum([float(worst)])[0]))
        return False

    def rounds(self) -> list[list[Share]]:
        """Of each pass the shares of all data-parallel ranks; a rank without samples has an ignored micro batch."""
        mesh, options = self.engine.mesh, row_options(self.config, self.engine.mesh)
        packing = self.config.data.packing
        assert packing
        numbers, starts = range(len(self.samples)), range(0, len(self.samples), options.micro_batch_size)
        groups = [numbers[start : start + options.micro_batch_size] for start in starts]
        shares = [Share(group, LAYOUTS[packing].rows([self.samples[n] for n in group], options)) for group in groups]
        missing = -len(shares) % mesh.size("dp")
        shares += [Share((), ignored_rows(options))] * missing
        return [shares[start : start + mesh.size("dp")] for start in range(0, len(shares), mesh.size("dp"))]

    def _compare(self, shares: Sequence[Share]) -> list[RowDifference]:
        """The rows of one pass, on the main rank."""
        logits = whole_logits(self.engine, [share.rows for share in shares], self.vocab_size)
        compared = []
        for share, whole in zip(shares, logits, strict=False):  # no logits but on the main rank
            for number, part in zip(share.numbers, self._places(share), strict=True):
                assert self.theirs
                theirs = self.theirs.logits(share.rows.tokens[part]).to(whole.device)
                labels, weights = share.rows.labels[part], share.rows.weights[part]
                compared.append(compare_row(number, whole[part], theirs, labels, weights))
        return compared

    def _places(self, share: Share) -> list[slice]:
        """Where in the micro batch the tokens of each of its samples are."""
        options = row_options(self.config, self.engine.mesh)
        lengths = options.input_tokens(np.array([len(self.samples[number].tokens) for number in share.numbers]))
        starts = share.rows.cu_seqlens[: len(lengths)]
        return [slice(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]

    def _find_layer(self, rounds: Sequence[Sequence[Share]], number: int) -> None:
        """Say after which layer the hidden states of sample `number` begin to differ."""
        shares = next(shares for shares in rounds if any(number in share.numbers for share in shares))
        (data_rank,) = [rank for rank, share in enumerate(shares) if number in share.numbers]
        assert self.config.model.num_layers
        stages = virtual_stages(self.config.parallel, self.config.model.num_layers)
        ours = hidden_states(self.engine, [share.rows for share in shares], data_rank, stages)
        if not self.theirs:
            return
        share = shares[data_rank]
        part = self._places(share)[list(share.numbers).index(number)]
        theirs = self.theirs.hidden_states(share.rows.tokens[part], self.config.model.num_layers)
        found = layer_differences({layer: state[part] for layer, state in ours.items()}, theirs)
        self.say(f"\nhidden states of row {number}:\n{report_layers(found, self.tolerance)}")
