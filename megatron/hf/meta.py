"""Meta's own form of Llama: `consolidated.NN.pth`, one file a tensor rank, and `params.json`; as tables.

Names, shapes and defaults are those of Meta's model (github.com/meta-llama/llama, llama3 and codellama: `ModelArgs`).
Its rotary dimensions are neighbours (0 with 1, 2 with 3), where ours are halves of the head (0 with d/2, 1 with d/2+1).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron.config import FAMILIES, ModelConfig
from megatron.hf.forms import Rows, Source
from megatron.hf.rotary import DEFAULT_THETA, read_number
from megatron.hf.rows import translate

PARAMS = "params.json"
META = {
    "embedding": "tok_embeddings",
    "layers.{}.input_norm": "layers.{}.attention_norm",
    "layers.{}.attention.q": "layers.{}.attention.wq",
    "layers.{}.attention.k": "layers.{}.attention.wk",
    "layers.{}.attention.v": "layers.{}.attention.wv",
    "layers.{}.attention.o": "layers.{}.attention.wo",
    "layers.{}.mlp_norm": "layers.{}.ffn_norm",
    "layers.{}.mlp.gate": "layers.{}.feed_forward.w1",
    "layers.{}.mlp.up": "layers.{}.feed_forward.w3",
    "layers.{}.mlp.down": "layers.{}.feed_forward.w2",
    "final_norm": "norm",
    "lm_head": "output",
}
"""Our module -> Meta's."""
AXES: Mapping[str, int | None] = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
    **dict.fromkeys(("attention_norm", "ffn_norm", "norm"), None),
}
"""Module -> the dimension that is divided over the files; None: each file has all of it."""
FEED_FORWARD, EMBEDDING, OUTPUT = "layers.0.feed_forward.w1.weight", "tok_embeddings.weight", "output.weight"
BUFFERS = ("rope.freqs",)
"""What the files hold besides weights."""
REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of")
COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor")
KNOWN = {*COUNTS, *NUMBERS, "vocab_size", "use_scaled_rope", "max_seq_len", "max_batch_size"}
"""Keys of params.json; another one with a value that says something is refused."""
SCALED_ROPE: Mapping[str, Any] = {
    "rope_scaling_type": "llama3",
    "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 8192,
    "max_position_embeddings": 131072,
}
"""What `use_scaled_rope` stands for, as in Llama 3.1."""
META_FAMILIES = ("llama", "llama2", "codellama", "llama3")


def paired_rows(size: int) -> Rows:
    """Where each row of a head lies among `size` rows whose rotary dimensions are neighbours: 0, 2, .., 1, 3, .."""
    return np.arange(size).reshape(-1, 2).T.ravel()


def meta_source(name: str, model: ModelConfig) -> Source:
    """Where our parameter lies in the joined files.

    Raises:
        ValueError: Meta's Llama has no such weight.
    """
    part, size = name.split(".")[-2], model.kv_channels
    heads = {"q": model.num_attention_heads, "k": model.num_attention_heads_kv}.get(part)
    assert size
    rows = None if heads is None else (np.arange(heads)[:, None] * size + paired_rows(size)).ravel()
    return Source(translate(name, META), rows)


def meta_axis(name: str, columns: int, files: int, dim: int) -> int | None:
    """The dimension in which `files` files share a tensor, of `columns` columns in each; None if each has all of it.

    The embedding is divided by columns in Llama 1 and 2, by rows in Llama 3.

    Raises:
        ValueError: Meta's Llama has no such weight.
    """
    translate(name, {theirs: ours for ours, theirs in META.items()})
    module = name.split(".")[-2]
    return (1 if columns * files == dim else 0) if name == EMBEDDING else AXES[module]


def meta_fields(
    params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], family: str | None, source: object
) -> tuple[dict[str, Any], list[str]]:
    """Our architecture fields of the model, and what had to be taken for granted.

    Args:
        params: params.json.
        shapes: of the tensors, joined.
        family: the one the user names; None: found from `rope_theta` and `norm_eps`.
        source: the path of params.json, for messages.

    Raises:
        ValueError: a key is missing, is not known, or contradicts the family or the tensors.
    """
    _check(params, source)
    theta = read_number(params, "rope_theta", source) or DEFAULT_THETA
    named, family = family, family or _family(theta, params, source)
    _check_family(family, theta, source)
    missing = [name for name in (EMBEDDING, FEED_FORWARD) if name not in shapes]
    if missing:
        raise ValueError(f"{source}: the files beside it have no {missing[0]}")
    rows, (ffn, *_) = shapes[EMBEDDING][0], shapes[FEED_FORWARD]
    if params.get("vocab_size", -1) not in (-1, None, rows):
        raise ValueError(f"{source}: vocab_size is {params['vocab_size']}, but {EMBEDDING} has {rows} rows")
    if ffn != _ffn_size(params):
        raise ValueError(
            f"{source}: dim, multiple_of and ffn_dim_multiplier make a feed-forward size of {_ffn_size(params)}, but "
            f"{FEED_FORWARD} has {ffn} rows; is a consolidated.NN.pth missing?"
        )
    fields = {
        **FAMILIES[family].requires,
        "model_name": family,
        "num_layers": params["n_layers"],
        "hidden_size": params["dim"],
        "ffn_hidden_size": ffn,
        "num_attention_heads": params["n_heads"],
        "num_attention_heads_kv": params.get("n_kv_heads") or params["n_heads"],
        "kv_channels": params["dim"] // params["n_heads"],
        "layernorm_epsilon": float(params["norm_eps"]),
        "rope_theta": theta,
        "tie_embed_logits": OUTPUT not in shapes,
        "max_position_embeddings": FAMILIES[family].advises["max_position_embeddings"],
        **_scaling(params),
    }
    return fields, _notes(fields, params, is_guess=named is None)


def _check(params: Mapping[str, Any], source: object) -> None:
    missing = [key for key in REQUIRED if params.get(key) is None]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} is missing")
    unknown = [key for key, value in params.items() if key not in KNOWN and value]
    if unknown:
        raise ValueError(f"{source}: {unknown[0]} is {params[unknown[0]]!r}, which is not supported")
    for key in COUNTS:
        if params.get(key) is not None and (type(params[key]) is not int or params[key] < 1):
            raise ValueError(f"{source}: {key} is {params[key]!r}, not a positive whole number")
    for key in NUMBERS:
        if (number := read_number(params, key, source)) is not None and number <= 0:
            raise ValueError(f"{source}: {key} is {params[key]!r}, not positive")
    if params["dim"] % params["n_heads"]:
        raise ValueError(f"{source}: dim {params['dim']} is not a multiple of n_heads {params['n_heads']}")


def _family(theta: float, params: Mapping[str, Any], source: object) -> str:
    """The family that these values are usual in."""
    first = "llama" if params["norm_eps"] < 5e-6 else "llama2"
    families = {DEFAULT_THETA: first, **{_usual_theta(name): name for name in ("codellama", "llama3")}}
    if theta not in families:
        raise ValueError(f"{source}: rope_theta is {theta:g}; no family of {', '.join(META_FAMILIES)} has that")
    return families[theta]


def _usual_theta(family: str) -> float:
    return float(FAMILIES[family].advises.get("rope_theta", DEFAULT_THETA))


def _check_family(family: str, theta: float, source: object) -> None:
    if family not in META_FAMILIES:
        raise ValueError(f"{source} describes a model of {', '.join(META_FAMILIES)}, not of {family}")
    usual = _usual_theta(family)
    if theta != usual:
        raise ValueError(f"{source}: rope_theta is {theta:g}, but {family} has {usual:g}; name the family it is of")


def _ffn_size(params: Mapping[str, Any]) -> int:
    """Two thirds of 4 x dim, stretched, and rounded up to a multiple, as Meta's `FeedForward` computes it."""
    size = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(params["ffn_dim_multiplier"] * size)
    return -(-size // params["multiple_of"]) * int(params["multiple_of"])


def _scaling(params: Mapping[str, Any]) -> dict[str, Any]:
    if not params.get("use_scaled_rope"):
        return {"rope_scaling_type": "linear", "rope_scaling_factor": 1.0}
    factor = params.get("rope_scaling_factor") or SCALED_ROPE["rope_scaling_factor"]
    return {**SCALED_ROPE, "rope_scaling_factor": float(factor)}


def _notes(fields: Mapping[str, Any], params: Mapping[str, Any], is_guess: bool) -> list[str]:
    notes = []
    if is_guess:
        notes.append(
            f"{PARAMS} names no family; by rope_theta {fields['rope_theta']:g} and norm_eps {params['norm_eps']:g} it "
            f"is taken for {fields['model_name']}, with max_position_embeddings {fields['max_position_embeddings']}"
        )
    if params.get("use_scaled_rope") and not params.get("rope_scaling_factor"):
        notes.append(
            f"use_scaled_rope in {PARAMS} says no factor; Llama 3.1's 8 is taken. For Llama 3.2, which has 32, add "
            f'"rope_scaling_factor": 32 to {PARAMS}'
        )
    return notes
