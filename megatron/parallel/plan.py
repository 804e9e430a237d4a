"""The one description of sharding: how each parameter is split over the tensor-parallel ranks, and where layers live.

| kind     | stored as                  | example                    |
|----------|----------------------------|----------------------------|
| `vocab`  | rows split over ranks      | embedding, lm_head         |
| `column` | rows split (outputs)       | q, k, v, gate, up          |
| `row`    | columns split (inputs)     | o, down                    |
| `whole`  | on every rank              | norms, biases of row       |
| `heads`  | on every rank, whose heads | norms of q and k; k and v  |
|          | compute with all or some   | of fewer heads than ranks  |

Under sequence parallelism a rank computes with its tokens only, so that its gradient of a `whole` parameter is one
summand. That of a `heads` parameter always is.

Parts are PyTorch's chunks: ceil(size / ranks) rows each, the last ones shorter. Only the vocabulary may be uneven.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron.config import ModelConfig, ParallelConfig, UsageError


@dataclass(frozen=True)
class Split:
    """How a parameter is divided.

    Attributes:
        kind: see above.
        dim: along which dimension; None: it is on every rank.
        even: whether parts are of one size.
        gradient_by_heads: each rank's gradient comes from its heads alone.
    """

    kind: str
    dim: int | None
    even: bool = True
    gradient_by_heads: bool = False


VOCAB = Split("vocab", 0, even=False)
COLUMN = Split("column", 0)
ROW = Split("row", 1)
WHOLE = Split("whole", None)
HEADS = Split("heads", None, gradient_by_heads=True)

PLAN = {
    r"embedding\.weight": VOCAB,
    r"position_embedding\.weight": WHOLE,
    r"layers\.\d+\.attention\.(q|k|v)\.(weight|bias)": COLUMN,
    r"layers\.\d+\.attention\.(q_norm|k_norm)\.weight": HEADS,
    r"layers\.\d+\.attention\.o\.weight": ROW,
    r"layers\.\d+\.attention\.o\.bias": WHOLE,
    r"layers\.\d+\.mlp\.(gate|up)\.(weight|bias)": COLUMN,
    r"layers\.\d+\.mlp\.down\.weight": ROW,
    r"layers\.\d+\.mlp\.down\.bias": WHOLE,
    r"layers\.\d+\.(input_norm|mlp_norm|output_norm)\.(weight|bias)": WHOLE,
    r"final_norm\.(weight|bias)": WHOLE,
    r"lm_head\.weight": VOCAB,
}
"""Parameter name -> split; every parameter of a model matches exactly one row."""


def split_of(name: str, model: ModelConfig, tensor_size: int) -> Split:
    """The split of parameter `name` over `tensor_size` ranks.

    Key/value heads fewer than ranks cannot be divided: their weights are whole, and each rank computes with its head.
    """
    if re.fullmatch(r"layers\.\d+\.attention\.(k|v)\.(weight|bias)", name) and key_value_heads(model) < tensor_size:
        return HEADS
    matches = [split for pattern, split in PLAN.items() if re.fullmatch(pattern, name)]
    assert len(matches) == 1, f"{name} matches {len(matches)} rows of the plan"
    return matches[0]


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, length) of part `index` of `size` rows in `parts` parts, as `torch.chunk` and DTensor divide them."""
    step = -(-size // parts)
    start = min(index * step, size)
    return start, min(start + step, size) - start


def tensor_ranges(
    name: str, shape: tuple[int, ...], model: ModelConfig, tensor_size: int, tensor_rank: int
) -> tuple[slice, ...]:
    """Which part of the whole parameter `name` a tensor-parallel rank holds."""
    ranges = [slice(0, size) for size in shape]
    split = split_of(name, model, tensor_size)
    if split.dim is not None:
        start, length = chunk(shape[split.dim], tensor_size, tensor_rank)
        ranges[split.dim] = slice(start, start + length)
    return tuple(ranges)


def key_value_heads(model: ModelConfig) -> int:
    """Number of key/value heads."""
    assert model.num_attention_heads_kv is not None
    return model.num_attention_heads_kv


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """The global numbers of the layers of each pipeline stage, spread evenly.

    A remainder goes to the stages in the middle first: the last one has the output layer besides, and the first one
    the embedding and the most micro batches in flight.
    """
    quotient, remainder = divmod(num_layers, stages)
    takers = [*range(1, stages - 1), 0, stages - 1][:remainder]
    return _consecutive([quotient + (stage in takers) for stage in range(stages)])


def virtual_stages(parallel: ParallelConfig, num_layers: int) -> list[range]:
    """The layers of each virtual stage of the pipeline (`megatron.parallel.schedule`), as the flags have it.

    Raises:
        UsageError: there are fewer layers than virtual stages, or the layers asked for are not those of the model.
    """
    stages, sizes = parallel.pipeline_model_parallel_size, parallel.layers_per_pipeline_stage
    if sizes:
        if sum(sizes) != num_layers or len(sizes) % stages or (stages == 1 and len(sizes) > 1):
            raise UsageError(
                f"--layers_per_pipeline_stage {' '.join(map(str, sizes))} should be {stages} numbers (interleaved, a "
                f"multiple) for --pipeline_model_parallel_size {stages}, with a sum of {num_layers} layers"
            )
        return _consecutive(sizes)
    most = parallel.num_layers_per_virtual_pipeline_stage
    chunks = -(-num_layers // (stages * most)) if most and stages > 1 else 1
    if num_layers < stages * chunks:
        raise UsageError(
            f"--num_layers_per_virtual_pipeline_stage {most} cuts {num_layers} layers into {chunks} chunks for each of "
            f"{stages} pipeline stages, more chunks than layers; give a larger one"
        )
    return stage_layers(num_layers, stages * chunks)


def stage_of(name: str, num_layers: int, stages: int) -> int:
    """The pipeline stage that holds parameter `name`: the embedding on the first, last norm and head on the last."""
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer:
        return next(s for s, layers in enumerate(stage_layers(num_layers, stages)) if int(layer[1]) in layers)
    return 0 if name.startswith(("embedding.", "position_embedding.")) else stages - 1


def _consecutive(sizes: Sequence[int]) -> list[range]:
    stops = list(accumulate(sizes))
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def check_layout(
    model: ModelConfig,
    tensor_size: int,
    pipeline_size: int,
    flags: tuple[str, str] = ("--tensor_model_parallel_size", "--pipeline_model_parallel_size"),
) -> None:
    """Raise `UsageError`, naming `flags`, unless `model` divides over a layout of `tensor_size` x `pipeline_size`."""
    assert model.num_layers and model.num_attention_heads and model.ffn_hidden_size
    heads, kv_heads = model.num_attention_heads, key_value_heads(model)
    flag = f"{flags[0]} {tensor_size}"
    if heads % tensor_size:
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and model.ffn_hidden_size % n == 0]
        raise UsageError(f"{flag} does not divide the {heads} attention heads of {model.model_name}; use one of {fits}")
    if kv_heads % tensor_size and tensor_size % kv_heads:
        raise UsageError(
            f"{flag} neither divides nor is a multiple of the {kv_heads} key/value heads of {model.model_name}; "
            f"use a divisor or a multiple of {kv_heads} that divides {heads}"
        )
    if model.ffn_hidden_size % tensor_size:
        raise UsageError(f"{flag} does not divide --ffn_hidden_size {model.ffn_hidden_size} of {model.model_name}")
    if model.num_layers < pipeline_size:
        raise UsageError(
            f"{flags[1]} {pipeline_size} is more than the {model.num_layers} layers of "
            f"{model.model_name}; use at most {model.num_layers}"
        )
