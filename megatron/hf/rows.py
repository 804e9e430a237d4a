"""Names of weights here and in Hugging Face's Llama, one row a module, read in both directions.

Checkpoints of this toolkit use these names for every family, so that what reads Llama reads them. `{}` stands for the
layer's number. Families whose files look otherwise: `megatron.hf.forms`.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from megatron.config import ModelConfig
from megatron.model import Model

LLAMA = {
    "embedding": "model.embed_tokens",
    "position_embedding": "model.embed_positions",
    "layers.{}.input_norm": "model.layers.{}.input_layernorm",
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.o": "model.layers.{}.self_attn.o_proj",
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "layers.{}.output_norm": "model.layers.{}.output_layernorm",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
"""Our module -> Hugging Face's."""


def to_hf(name: str) -> str:
    """Hugging Face's name of our parameter `name`."""
    return translate(name, LLAMA)


def from_hf(name: str) -> str:
    """Our name of Hugging Face's parameter `name`.

    Raises:
        ValueError: it is no weight of a Llama.
    """
    return translate(name, {theirs: ours for ours, theirs in LLAMA.items()})


def translate(name: str, table: Mapping[str, str]) -> str:
    """The name of a parameter whose module is renamed by `table`.

    Raises:
        ValueError: the module is not in it.
    """
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)(?=\.|$)", module)
    pattern = module.replace(number[0], ".{}", 1) if number else module
    if pattern not in table or kind not in ("weight", "bias"):
        raise ValueError(f"unknown weight {name}")
    return f"{table[pattern].replace('{}', number[1] if number else '')}.{kind}"


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Our names of all parameters of a model, and their shapes."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Model(config, vocab_size).named_parameters()}


def check_complete(names: Iterable[str], config: ModelConfig, source: object) -> None:
    """Raise `ValueError`, naming them, if `names` (ours) are not exactly the parameters of the model in `source`.

    A model with tied embeddings may come with the output layer's copy.
    """
    found = set(names)
    if (config.num_layers or 0) > len(found):  # before a model of so many is made
        raise ValueError(f"{source}: {config.num_layers} layers, but {len(found)} weights")
    expected = set(parameter_shapes(config, 1))
    if config.tie_embed_logits:
        found.discard("lm_head.weight")
    for what, difference in {"lacks": expected - found, "has unknown": found - expected}.items():
        if difference:
            some = ", ".join(sorted(map(to_hf, difference))[:5])
            raise ValueError(f"{source} {what} weights: {some}{', ...' if len(difference) > 5 else ''}")
