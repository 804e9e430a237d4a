"""The form of Megatron-LLM's checkpoints, `mp_rank_TT[_PPP]/model_optim_rng.pt`: names, index maps, `args`; as tables.

    ours                              theirs (2 query heads a key/value head, 2 tensor ranks)
    attention.q, .k, .v   ◀────▶      query_key_value   q q k v | q q k v     rows of q and k as rotary pairs
    mlp.up, mlp.gate      ◀────▶      dense_h_to_4h     up gate | up gate     | is where rank 1 begins

As written by `weights_conversion` and `megatron/checkpointing.py` of github.com/epfLLM/Megatron-LLM.
"""

import re
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

import numpy as np

from megatron.config import FAMILIES, ModelConfig
from megatron.hf.forms import Rows, Source, grouped_rows
from megatron.hf.meta import paired_rows
from megatron.hf.rows import translate

REFERENCE = {
    "embedding": "embedding.word_embeddings",
    "layers.{}.input_norm": "layers.{}.input_layernorm",
    "layers.{}.attention.q": "layers.{}.attention.query_key_value",
    "layers.{}.attention.k": "layers.{}.attention.query_key_value",
    "layers.{}.attention.v": "layers.{}.attention.query_key_value",
    "layers.{}.attention.o": "layers.{}.attention.dense",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "layers.{}.mlp.dense_4h_to_h",
    "final_norm": "final_layernorm",
    "lm_head": "lm_head",
}
"""Our module -> theirs."""
TWO_NORMS = {**REFERENCE, "layers.{}.mlp_norm": "layers.{}.mlp_layernorm"}
"""With `parallel_layernorm`."""
TIED_COPY = "word_embeddings_for_head.weight"
"""The last pipeline stage's copy of a tied embedding."""
FEED_FORWARD = "layers.0.mlp.dense_4h_to_h.weight"
ROWS = ("embedding.word_embeddings.weight", "lm_head.weight", TIED_COPY)
SPLIT = {
    "attention.query_key_value.weight": 0,
    "attention.query_key_value.bias": 0,
    "mlp.dense_h_to_4h.weight": 0,
    "mlp.dense_h_to_4h.bias": 0,
    "attention.dense.weight": 1,
    "mlp.dense_4h_to_h.weight": 1,
}
"""Parameter of a layer -> the dimension that is divided over tensor ranks; each rank has all of any other."""
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
DEFAULTS: Mapping[str, Any] = {
    "ffn_hidden_size": None,
    "num_attention_heads_kv": None,
    "kv_channels": None,
    "sliding_window_size": None,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling_factor": 1.0,
    "use_rms_norm": False,
    "use_bias": False,
    "use_post_ln": False,
    "parallel_attn": False,
    "parallel_layernorm": False,
    "tie_embed_logits": True,
    "glu_activation": None,
    "position_embedding_type": "absolute",
}
"""Arguments of the architecture, named as ours, that files may leave out, and the reference's defaults for them."""
OPTIONAL: Mapping[str, Any] = {
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "lima_dropout": False,
    "init_method_std": 0.02,
    "init_method_xavier_uniform": False,
}
"""Further ones, taken only where they are there."""
FIXED = {"openai_gelu": False, "onnx_safe": False, "apply_residual_connection_post_layernorm": False}
"""Arguments that must have these values for a model to be what is computed here; None counts as False."""
COUNTS = {*REQUIRED, "ffn_hidden_size", "num_attention_heads_kv", "kv_channels", "sliding_window_size"}
POSITION_TYPES = {"1": "rotary", "2": "absolute"}
"""Members of the reference's enumeration."""
FAMILIES_THERE = ("llama", "llama2", "codellama", "falcon", "mistral")
VERSION = 3.0


def model_parts(content: Mapping[str, Any], source: object) -> list[Any]:
    """The model in a file, or its parts where stages are interleaved: "model0", "model1", ..

    Raises:
        ValueError: there is none.
    """
    numbered = takewhile(content.__contains__, (f"model{number}" for number in count()))
    parts = [content[key] for key in (["model"] if "model" in content else numbered)]
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"{source} has no model")
    return parts


def usual_name(name: str, first_layer: int) -> str:
    """A name as it is in the whole model: below "language_model", in the newer spelling, with its layer's number there.

    Args:
        name: as in the file, parts joined by dots.
        first_layer: number of the file's first layer.
    """
    name = re.sub(r"^language_model\.((encoder|transformer)\.)?", "", name).replace(".self_attention.", ".attention.")
    name = "lm_head.weight" if name == "lm_head" else name
    return re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + first_layer}.", name)


def reference_axis(name: str) -> int | None:
    """The dimension in which tensor ranks share a tensor; None if each has all of it.

    Raises:
        ValueError: the reference's models have no such weight.
    """
    if name in ROWS:
        return 0
    for table in (REFERENCE, TWO_NORMS):
        known = {theirs: ours for ours, theirs in table.items()}
        try:
            translate(name, known)
        except ValueError:
            continue
        return SPLIT.get(name.split(".", 2)[-1])
    raise ValueError(f"unknown weight {name}")


def reference_source(name: str, model: ModelConfig, ranks: int) -> Source:
    """Where our parameter lies in the joined files of `ranks` tensor ranks.

    Raises:
        ValueError: the reference's models have no such weight.
    """
    theirs = translate(name, TWO_NORMS if model.parallel_layernorm else REFERENCE)
    part = name.split(".")[-2]
    if part in ("q", "k", "v"):
        size = model.kv_channels
        assert size
        return Source(theirs, grouped_rows(part, model, np.arange(size) if part == "v" else paired_rows(size)))
    if part in ("gate", "up") and model.glu_activation:
        return Source(theirs, _glu_rows(part, model, ranks))
    return Source(theirs)


def _glu_rows(part: str, model: ModelConfig, ranks: int) -> Rows:
    """Rank by rank its share of up, then its share of gate."""
    assert model.ffn_hidden_size
    share = model.ffn_hidden_size // ranks
    begin = np.arange(ranks)[:, None] * 2 * share + ("up", "gate").index(part) * share
    return (begin + np.arange(share)).ravel()


def reference_fields(
    args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], family: str | None, source: object
) -> tuple[dict[str, Any], list[str]]:
    """Our architecture fields of the model, and what had to be taken for granted.

    Args:
        args: the arguments in the checkpoint.
        shapes: of the tensors, joined.
        family: the one the user names, for files that do not say it; None: found from the arguments.
        source: the file, for messages.

    Raises:
        ValueError: an argument is missing, has no sensible value, or contradicts the family or the tensors.
    """
    missing = [key for key in REQUIRED if args.get(key) is None]
    if missing:
        raise ValueError(f"{source}: args has no {', '.join(missing)}")
    fields = {**DEFAULTS, **{key: args[key] for key in (*REQUIRED, *DEFAULTS) if args.get(key) is not None}}
    fields["position_embedding_type"] = _position_type(fields["position_embedding_type"])
    fields |= {key: args[key] for key in OPTIONAL if args.get(key) is not None}
    _check_values(fields, args, source)
    heads = fields["num_attention_heads"]
    fields["num_attention_heads_kv"] = fields["num_attention_heads_kv"] or heads
    fields["kv_channels"] = fields["kv_channels"] or fields["hidden_size"] // heads
    fields["ffn_hidden_size"] = fields["ffn_hidden_size"] or _shape(shapes, FEED_FORWARD, source)[1]
    fields["model_name"] = name = _family(args, fields, family, source)
    _check_family(name, fields, source)
    _check_tensors(args, fields, shapes, source)
    return {**FAMILIES[name].requires, **fields}, _notes(args, fields, shapes)


def _position_type(value: Any) -> str:
    """Text, or the members of an enumeration, of which only the value is kept."""
    text = str(value).removeprefix("PositionEmbeddingType.")
    return POSITION_TYPES.get(text, text)


def _check_values(fields: Mapping[str, Any], args: Mapping[str, Any], source: object) -> None:
    for key, value in fields.items():
        usual = {**DEFAULTS, **OPTIONAL}.get(key)
        if key in COUNTS and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{source}: args.{key} is {value!r}, not a positive whole number")
        if type(usual) is bool and type(value) is not bool:
            raise ValueError(f"{source}: args.{key} is {value!r}, neither True nor False")
        if type(usual) is float and type(value) not in (int, float):
            raise ValueError(f"{source}: args.{key} is {value!r}, not a number")
    for key, value in FIXED.items():
        if bool(args.get(key)) != value:
            raise ValueError(f"{source}: args.{key} is {args[key]!r}; only {value} is supported")


def _family(args: Mapping[str, Any], fields: Mapping[str, Any], family: str | None, source: object) -> str:
    stored = args.get("model_name")
    if stored is not None and family not in (None, stored):
        raise ValueError(f"{source}: args.model_name is {stored!r}, not {family!r}")
    found = stored or family or _usual_family(fields)
    if found not in FAMILIES_THERE:
        raise ValueError(f"{source}: a checkpoint of {found!r}; supported are {', '.join(FAMILIES_THERE)}")
    return str(found)


def _usual_family(fields: Mapping[str, Any]) -> str:
    """The family that these values are usual in."""
    marks = {
        "falcon": fields["parallel_attn"],
        "mistral": fields["sliding_window_size"],
        "codellama": fields["rope_theta"] == FAMILIES["codellama"].advises["rope_theta"],
        "llama": fields["layernorm_epsilon"] < 5e-6,
    }
    return next((name for name, is_so in marks.items() if is_so), "llama2")


def _check_family(name: str, fields: Mapping[str, Any], source: object) -> None:
    for key, value in FAMILIES[name].requires.items():
        if fields.get(key, value) != value:
            raise ValueError(f"{source}: args.{key} is {fields[key]!r}, but {name} has {value!r}")


def _check_tensors(
    args: Mapping[str, Any], fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: object
) -> None:
    rows = _shape(shapes, ROWS[0], source)[0]
    if args.get("padded_vocab_size") not in (None, rows):
        raise ValueError(
            f"{source}: args.padded_vocab_size is {args['padded_vocab_size']}, but {ROWS[0]} of all ranks has {rows} "
            "rows"
        )
    if fields["tie_embed_logits"] == ("lm_head.weight" in shapes):
        has = "no lm_head" if not fields["tie_embed_logits"] else "an lm_head"
        raise ValueError(f"{source}: args.tie_embed_logits is {fields['tie_embed_logits']}, but there is {has}")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, source: object) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{source}: it and the files beside it have no {name}")
    return shapes[name]


def _notes(args: Mapping[str, Any], fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    notes = ["only the weights are taken from a checkpoint of Megatron-LLM: training starts at iteration 0"]
    if fields["sliding_window_size"]:
        window = fields["sliding_window_size"]
        notes.append(
            f"sliding_window_size {window} is taken as Hugging Face counts it, the token itself included; Megatron-LLM "
            f"attends to {window} tokens and itself"
        )
    if args.get("make_vocab_size_divisible_by") != 1 or args.get("tensor_model_parallel_size") not in (None, 1):
        notes.append(
            f"all {shapes[ROWS[0]][0]} rows of the vocabulary are kept; Megatron-LLM pads it, --true_vocab_size of "
            "tools/checkpoint_util.py cuts it to its true size"
        )
    return notes
