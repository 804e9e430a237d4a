"""Tiny models of `transformers`, written as Megatron-LLM would: plain reshapes by its documented rules."""

import enum
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_families import FALCON, GROUPED, LLAMA, LLAMA3, save_random
from tiny_llamas import filled_model, logits
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.export import export, logits_difference

SIZES = {"vocab_size": 104, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA_SIZES = {**LLAMA, **SIZES, "num_key_value_heads": 4, "intermediate_size": 192}
FALCON_SIZES = {**FALCON, **SIZES}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped-query": ("llama", LLAMA_SIZES),
    "llama, multi-head": ("llama", {**LLAMA_SIZES, "num_key_value_heads": 8, "rms_norm_eps": 1e-6}),
    "llama, multi-query": ("llama", {**LLAMA_SIZES, "num_key_value_heads": 1}),
    "llama, tied": ("llama", {**LLAMA_SIZES, "tie_word_embeddings": True}),
    "codellama": ("llama", {**LLAMA_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama 3": ("llama", {**LLAMA_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.1": (
        "llama",
        {**LLAMA_SIZES, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}},
    ),
    "linear scaling": (
        "llama",
        {**LLAMA_SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("mistral", {**LLAMA_SIZES, "sliding_window": 5}),
    "falcon 7b": ("falcon", {**FALCON_SIZES, "multi_query": True, "new_decoder_architecture": False}),
    "falcon 40b": ("falcon", {**FALCON_SIZES, **GROUPED, "num_kv_heads": 4}),
}


def tiny_model(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A model with random weights, norms too, saved in `folder` as `transformers` does."""
    kind, settings = MODELS[name]
    return save_random(folder, kind, {**settings, **changes}, seed=5)


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head: halves [0 .. d/2, d/2 .. d] -> neighbours [0, d/2, 1, d/2 + 1, ..]."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


Edit = Callable[[dict[str, Any]], object]


def unedited(content: dict[str, Any]) -> None:
    """Leave a file as it is."""


class PositionEmbeddingType(enum.Enum):
    """As Megatron-LLM has it."""

    rotary = 1
    absolute = 2


@contextmanager
def reference_modules() -> Iterator[None]:
    """Pickles name Megatron-LLM's own module of enumerations, which exists only while this lasts."""
    module = ModuleType("megatron.model.enums")
    module.__dict__["PositionEmbeddingType"] = PositionEmbeddingType
    PositionEmbeddingType.__module__ = module.__name__
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]


def grouped(q: Tensor, k: Tensor, v: Tensor, groups: int, heads: int) -> Tensor:
    """q .. q, k, v of each group; rows of q and k in pairs."""
    triples = zip(in_pairs(q, heads).chunk(groups), in_pairs(k, groups).chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([part for triple in triples for part in triple])


def llama_layer(weights: Mapping[str, Tensor], config: Any, number: int, ranks: int) -> list[dict[str, Tensor]]:
    """A layer of Llama or Mistral, for each tensor rank."""
    at = f"model.layers.{number}."
    q, k, v, o = (weights[f"{at}self_attn.{part}_proj.weight"] for part in "qkvo")
    gate, up, down = (weights[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    fused = grouped(q, k, v, config.num_key_value_heads, config.num_attention_heads)
    both = zip(up.chunk(ranks), gate.chunk(ranks), strict=True)
    return [
        {
            "input_layernorm.weight": weights[f"{at}input_layernorm.weight"],
            "attention.query_key_value.weight": fused.chunk(ranks)[rank],
            "attention.dense.weight": o.chunk(ranks, 1)[rank],
            "post_attention_layernorm.weight": weights[f"{at}post_attention_layernorm.weight"],
            "mlp.dense_h_to_4h.weight": torch.cat(pair),
            "mlp.dense_4h_to_h.weight": down.chunk(ranks, 1)[rank],
        }
        for rank, pair in enumerate(both)
    ]


def falcon_layer(weights: Mapping[str, Tensor], config: Any, number: int, ranks: int) -> list[dict[str, Tensor]]:
    """A layer of Falcon, for each tensor rank."""
    at, heads = f"transformer.h.{number}.", config.num_attention_heads
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    fused = weights[f"{at}self_attention.query_key_value.weight"]
    by_head = fused.view(groups, heads // groups + 2, -1, fused.shape[-1])
    q, k, v = (part.reshape(-1, fused.shape[-1]) for part in (by_head[:, :-2], by_head[:, -2], by_head[:, -1]))
    norms = {"input_layernorm": "input_layernorm"} if groups == 1 else {"input_layernorm": "ln_attn"}
    norms |= {} if groups == 1 else {"mlp_layernorm": "ln_mlp"}
    return [
        {
            **{f"{o}.{kind}": weights[f"{at}{t}.{kind}"] for o, t in norms.items() for kind in ("weight", "bias")},
            "attention.query_key_value.weight": grouped(q, k, v, groups, heads).chunk(ranks)[rank],
            "attention.dense.weight": weights[f"{at}self_attention.dense.weight"].chunk(ranks, 1)[rank],
            "mlp.dense_h_to_4h.weight": weights[f"{at}mlp.dense_h_to_4h.weight"].chunk(ranks)[rank],
            "mlp.dense_4h_to_h.weight": weights[f"{at}mlp.dense_4h_to_h.weight"].chunk(ranks, 1)[rank],
        }
        for rank in range(ranks)
    ]


def reference_args(model: PreTrainedModel, tensor: int, pipeline: int) -> dict[str, Any]:
    """What a trained checkpoint's `args` say of the model, and some of the rest."""
    config, is_falcon = model.config, model.config.model_type == "falcon"
    rotary = config.rope_parameters
    args = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": 4 * config.hidden_size if is_falcon else config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_attention_heads_kv": None if is_falcon else config.num_key_value_heads,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": 32,
        "layernorm_epsilon": config.layer_norm_epsilon if is_falcon else config.rms_norm_eps,
        "rope_theta": rotary["rope_theta"],
        "rope_scaling_factor": rotary.get("factor", 1.0),
        "sliding_window_size": getattr(config, "sliding_window", None),
        "tie_embed_logits": config.tie_word_embeddings,
        "use_rms_norm": not is_falcon,
        "glu_activation": None if is_falcon else "swiglu",
        "parallel_attn": is_falcon,
        "parallel_layernorm": is_falcon and config.new_decoder_architecture,
        "use_bias": False,
        "use_post_ln": False,
        "position_embedding_type": PositionEmbeddingType.rotary,
        "make_vocab_size_divisible_by": 1,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "params_dtype": torch.bfloat16,
        "data_path": [Path("/data/text"), "0.5"],
        "lr": np.float64(1e-4),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if is_falcon:
        args["num_attention_heads_kv"] = config.num_kv_heads if config.new_decoder_architecture else 1
    return args


def write_reference(
    folder: Path,
    model: PreTrainedModel,
    tensor: int = 1,
    pipeline: int = 1,
    *,
    iteration: int | None = None,
    chunks: int = 1,
    as_released: bool = False,
    rows: int | None = None,
    edit: Edit = unedited,
    **args: Any,
) -> Path:
    """A checkpoint of any layout; returns the iteration's folder.

    Args:
        folder: gets the tracker.
        model: of `transformers`.
        tensor: its tensor size.
        pipeline: its pipeline size.
        iteration: None: "release".
        chunks: model parts a stage, interleaved.
        as_released: the older spelling, and no state of training, as in converted weights.
        rows: to which the vocabulary is padded.
        edit: is given the content of the last rank before it is saved.
        args: changes to the arguments; Ellipsis leaves one out.
    """
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release" if iteration is None else str(iteration))
    said = {**reference_args(model, tensor, pipeline), **({"model_name": None} if as_released else {}), **args}
    arguments = Namespace(**{key: value for key, value in said.items() if value is not ...})
    for rank, stage in np.ndindex(tensor, pipeline):
        parts = [_part(model, rank, tensor, stage, pipeline, chunk, chunks, rows) for chunk in range(chunks)]
        content: dict[str, Any] = {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration or "release"}
        content |= {"model": parts[0]} if chunks == 1 else {f"model{n}": part for n, part in enumerate(parts)}
        if as_released:
            content["model"] = _older(parts[0])
        else:
            content["rng_state"] = [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}]
            content["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
        path = folder / name / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
        path.mkdir(parents=True, exist_ok=True)
        with reference_modules():
            if (rank, stage) == (tensor - 1, pipeline - 1):
                edit(content)
            torch.save(content, path / "model_optim_rng.pt")
    return folder / name


def _part(
    model: PreTrainedModel, rank: int, ranks: int, stage: int, stages: int, chunk: int, chunks: int, rows: int | None
) -> dict[str, Any]:
    """What one tensor rank has of one model part of one stage, its layers counted from 0."""
    weights, config = model.state_dict(), model.config
    is_falcon = config.model_type == "falcon"
    layer = falcon_layer if is_falcon else llama_layer
    embedding = weights["transformer.word_embeddings.weight" if is_falcon else "model.embed_tokens.weight"]
    count = config.num_hidden_layers // stages // chunks
    begin = (chunk * stages + stage) * count
    encoder = {
        f"layers.{n}.{'self_' if name.startswith('attention') else ''}{name}": tensor.clone()
        for n in range(count)
        for name, tensor in layer(weights, config, begin + n, ranks)[rank].items()
    }
    language_model: dict[str, Any] = {"encoder": encoder}
    part: dict[str, Any] = {"language_model": language_model}
    if stage == 0 and chunk == 0:
        language_model["embedding"] = {"word_embeddings": {"weight": _vocabulary(embedding, rank, ranks, rows)}}
    if stage == stages - 1 and chunk == chunks - 1:
        norm = "transformer.ln_f" if is_falcon else "model.norm"
        kinds = ("weight", "bias") if is_falcon else ("weight",)
        encoder |= {f"final_layernorm.{kind}": weights[f"{norm}.{kind}"] for kind in kinds}
        if not config.tie_word_embeddings:
            language_model["lm_head"] = _vocabulary(weights["lm_head.weight"], rank, ranks, rows)
        elif stages > 1:
            part["word_embeddings_for_head"] = {"weight": _vocabulary(embedding, rank, ranks, rows)}
    return part


def _vocabulary(weight: Tensor, rank: int, ranks: int, rows: int | None) -> Tensor:
    padding = weight.new_full(((rows or len(weight)) - len(weight), weight.shape[1]), 7.0)
    return torch.cat([weight, padding]).chunk(ranks)[rank].clone()


def _older(part: dict[str, Any]) -> dict[str, Any]:
    """As the conversion scripts write it."""
    language_model = dict(part["language_model"])
    encoder = language_model.pop("encoder")
    embedding = {"word_embeddings.weight": language_model["embedding"]["word_embeddings"]["weight"]}
    transformer = {name.replace(".self_attention.", ".attention."): tensor for name, tensor in encoder.items()}
    return {"language_model": {**language_model, "embedding": embedding, "transformer": transformer}}


def explode(path: str) -> None:
    """What a `Bomb` has a loader do that runs what it is told."""
    Path(path).write_text("boom")


class Bomb:
    """Writes a file when it is unpickled by such a loader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (str(self.path),)


def assert_same_model(folder: Path, theirs: torch.nn.Module, hf: Path, family: str | None) -> None:
    """Tensors bit-equal, logits equal, and the export is the file that `transformers` wrote."""
    checkpoint, original = open_checkpoint(folder, family=family), open_checkpoint(hf)
    assert set(checkpoint.weights.names()) == set(original.weights.names())
    for name in original.weights.names():
        assert torch.equal(checkpoint.weights.read(name), original.weights.read(name)), name
    document = torch.arange(29) * 3 % 104
    with torch.no_grad():
        expected = theirs(document[None]).logits[0]
    torch.testing.assert_close(logits(filled_model(checkpoint), document), expected, rtol=1e-5, atol=1e-5)
    exported = export(checkpoint, hf.parent / "exported")
    assert logits_difference(checkpoint, exported) < 1e-5
    first, second = (load_file(place / "model.safetensors") for place in (hf, exported))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, known = (AutoConfig.from_pretrained(place).to_dict() for place in (exported, hf))
    assert {key: ours[key] for key in KEYS if key in known} == {key: known[key] for key in KEYS if key in known}


KEYS = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("rms_norm_eps", "layer_norm_epsilon", "tie_word_embeddings", "vocab_size", "rope_parameters", "model_type"),
    *("sliding_window", "multi_query", "new_decoder_architecture", "num_kv_heads", "parallel_attn", "ffn_hidden_size"),
)
"""Keys of config.json that these forms know of."""
