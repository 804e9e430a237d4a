"""Small checkpoints of a random Llama, and how to look at them."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import Ranks, Slice, TensorStore, begin_checkpoint
from megatron.config import RunConfig, resolve_run
from megatron.model import Model

VOCAB_SIZE = 37
CONFIG: RunConfig = resolve_run(
    {
        "model_name": "llama2",
        "num_layers": 3,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_attention_heads_kv": 2,
        "max_position_embeddings": 32,
        "seq_length": 8,
        "rope_theta": 5000.0,
        "micro_batch_size": 1,
        "train_iters": 4,
        "lr": 0.1,
        "data_type": "instruction",
        "tokenizer_type": "SentencePieceTokenizer",
        "tensor_model_parallel_size": 2,
    }
)
SCHEDULE = {"max_lr": 0.1}


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights by our names."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Model(CONFIG.model, VOCAB_SIZE).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def whole(name: str, tensor: Tensor) -> Slice:
    """All of a tensor as one slice."""
    return Slice.of(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def rows_of_rank(name: str, tensor: Tensor, rank: int, ranks: int) -> Slice:
    """A rank's share of the rows."""
    start, stop = len(tensor) * rank // ranks, len(tensor) * (rank + 1) // ranks
    return Slice.of(name, tuple(tensor.shape), (start,) + (0,) * (tensor.ndim - 1), tensor[start:stop])


def run_of(iteration: int) -> dict[str, Any]:
    """What training says of a run."""
    progress = {"iteration": iteration, "consumed_samples": 8 * iteration, "schedule": SCHEDULE}
    return {"config": CONFIG.to_dict(), "vocab_size": VOCAB_SIZE, "optimizer_steps": iteration, **progress}


def save(
    folder: Path,
    iteration: int,
    state: Mapping[str, Tensor],
    ranks: int = 1,
    dies_at_meeting: int | None = None,
    tokenizer: Sequence[Path] = (),
) -> Path:
    """Save weights, and twice them as optimizer state, as `ranks` ranks do together.

    With `dies_at_meeting` every rank is interrupted when they meet for that time, counted from 1.
    """
    total = totals(ranks)

    def of_rank(rank: int) -> None:
        files = {
            f"model/rank-{rank:05d}.safetensors": [rows_of_rank(n, t, rank, ranks) for n, t in state.items()],
            f"optimizer/rank-{rank:05d}.safetensors": [
                rows_of_rank(f"exp_avg.{n}", 2 * t, rank, ranks) for n, t in state.items()
            ],
        }
        meetings = itertools.count(1)

        def meet(value: float) -> float:
            if next(meetings) == dies_at_meeting:
                raise KeyboardInterrupt
            return total(rank, value)

        begin_checkpoint(
            folder, iteration, run_of(iteration), files, tokenizer, ranks=Ranks(rank, ranks, meet)
        ).complete()

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(of_rank, range(ranks)))
    return folder / f"iter_{iteration:07d}"


def totals(ranks: int) -> Callable[[int, float], float]:
    """What adds up the values of so many threads, (rank, value) -> sum, as a mesh does for ranks."""
    meeting, values = threading.Barrier(ranks), [0.0] * ranks

    def total(rank: int, value: float) -> float:
        values[rank] = value
        meeting.wait(30)
        result = sum(values)
        meeting.wait(30)
        return result

    return total


def contents(store: TensorStore) -> dict[str, Tensor]:
    """All tensors, read whole."""
    return {name: store.read(name) for name in store.names()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether names, types and all bits agree."""
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


def flip(path: Path, place: int = -3) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def weight_files(folder: Path) -> Iterator[Path]:
    """The files of weights of one checkpoint."""
    return iter(sorted((folder / "model").iterdir()))
