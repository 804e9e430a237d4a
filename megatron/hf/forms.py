"""What the weights of each family look like in Hugging Face's files: which rows of which tensor each of ours is.

    ours                                theirs (Falcon, one group of 2 query heads, 1 key and 1 value head)
    attention.q  rows 0 .. 2d   ◀────▶  query_key_value  rows 0 .. 2d
    attention.k  rows 0 .. d    ◀────▶                   rows 2d .. 3d
    attention.v  rows 0 .. d    ◀────▶                   rows 3d .. 4d

Such a table is read in both directions: ours are picked from theirs, theirs are put together from ours.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.config import ModelConfig
from megatron.hf.rows import to_hf, translate

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors lies.

    Attributes:
        name: of their tensor.
        rows: which of its rows are ours, in our order; None: it is the whole tensor, as it is.
        transposed: their matrix is [in, out], so that our rows are its columns.
    """

    name: str
    rows: Rows | None = None
    transposed: bool = False


Form = Callable[[str, ModelConfig], Source]
"""(our parameter, model) -> where it lies."""

FALCON = {
    "embedding": "transformer.word_embeddings",
    "layers.{}.input_norm": "transformer.h.{}.input_layernorm",
    "layers.{}.attention.q": "transformer.h.{}.self_attention.query_key_value",
    "layers.{}.attention.k": "transformer.h.{}.self_attention.query_key_value",
    "layers.{}.attention.v": "transformer.h.{}.self_attention.query_key_value",
    "layers.{}.attention.o": "transformer.h.{}.self_attention.dense",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
FALCON_TWO_NORMS = {
    **FALCON,
    "layers.{}.input_norm": "transformer.h.{}.ln_attn",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_mlp",
}
GPT2 = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "layers.{}.input_norm": "transformer.h.{}.ln_1",
    "layers.{}.attention.q": "transformer.h.{}.attn.c_attn",
    "layers.{}.attention.k": "transformer.h.{}.attn.c_attn",
    "layers.{}.attention.v": "transformer.h.{}.attn.c_attn",
    "layers.{}.attention.o": "transformer.h.{}.attn.c_proj",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def llama_form(name: str, model: ModelConfig) -> Source:
    """Every tensor as it is, under another name."""
    return Source(to_hf(name))


def falcon_form(name: str, model: ModelConfig) -> Source:
    """q, k and v are fused, group by group: its query heads, its key head, its value head."""
    theirs = translate(name, FALCON_TWO_NORMS if model.parallel_layernorm else FALCON)
    part, size = _part(name), model.kv_channels
    assert size
    return Source(theirs, grouped_rows(part, model, np.arange(size)) if part else None)


def gpt2_form(name: str, model: ModelConfig) -> Source:
    """q, k and v are fused, one after the other; matrices are [in, out]."""
    theirs, part = translate(name, GPT2), _part(name)
    assert model.hidden_size
    rows = np.arange(model.hidden_size) + "qkv".index(part) * model.hidden_size if part else None
    is_product = ".attention." in name or ".mlp." in name
    return Source(theirs, rows, transposed=is_product and name.endswith(".weight"))


def _part(name: str) -> str:
    """q, k or v, if the parameter is one's."""
    module = name.split(".")[-2]
    return module if module in ("q", "k", "v") else ""


def grouped_rows(part: str, model: ModelConfig, within: Rows) -> Rows:
    """The rows of q, k or v where they are fused group by group, each head's in the order `within`."""
    heads, groups, size = model.num_attention_heads, model.num_attention_heads_kv, model.kv_channels
    assert heads and groups and size
    queries = heads // groups
    places = {"q": np.arange(queries), "k": np.array([queries]), "v": np.array([queries + 1])}[part]
    taken = np.arange(groups)[:, None] * (queries + 2) + places  # [groups, heads of the part]
    return (taken.reshape(-1, 1) * size + within).ravel()


FORMS: Mapping[str, Form] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), llama_form),
    "falcon": falcon_form,
    "gpt2": gpt2_form,
}
"""`model_type` of config.json -> form."""


BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
"""What old files hold besides weights; it follows from the configuration."""
PREFIXES = {"falcon": "transformer.", "gpt2": "transformer."}
"""`model_type` -> how names of all but the output layer begin; files of the model without it leave that out."""


def usual_name(name: str, model_type: str) -> str:
    """A name as files of today have it; empty for what is no weight."""
    prefix = PREFIXES.get(model_type, "")
    if BUFFERS.fullmatch(name):
        return ""
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def sources(model_type: str, model: ModelConfig, names: Iterable[str]) -> dict[str, Source]:
    """Where each of our parameters `names` lies in files of `model_type`."""
    return {name: FORMS[model_type](name, model) for name in names}


def targets(model_type: str, model: ModelConfig, names: Iterable[str]) -> dict[str, dict[str, Source]]:
    """Their tensor -> those of ours that it is made of, each with its place in it."""
    return by_target(sources(model_type, model, names))


def by_target(places: Mapping[str, Source]) -> dict[str, dict[str, Source]]:
    """The same of tensors of ours whose places are known."""
    table: dict[str, dict[str, Source]] = {}
    for name, source in places.items():
        table.setdefault(source.name, {})[name] = source
    return table
