"""Names of weights here and in Hugging Face's checkpoints, one row each, read in both directions.

`{}` stands for the layer's number. Shapes are the same on both sides: rotary halves, separate q, k, v and gate, up are
how Hugging Face stores Llama, too.
"""

import re
from collections.abc import Iterable

from megatron.config import ModelConfig

LLAMA = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.{}.input_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
"""Our name -> Hugging Face's."""
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")
"""What old files hold besides weights; it follows from the configuration."""


def to_hf(name: str) -> str:
    """Hugging Face's name of our parameter `name`."""
    return _translate(name, LLAMA)


def from_hf(name: str) -> str:
    """Our name of Hugging Face's parameter `name`.

    Raises:
        ValueError: it is no weight of a Llama.
    """
    return _translate(name, {theirs: ours for ours, theirs in LLAMA.items()})


def parameter_names(config: ModelConfig) -> set[str]:
    """Our names of all parameters of a model."""
    assert config.num_layers
    names = {name.replace("{}", str(n)) for name in LLAMA for n in range(config.num_layers)}
    return names - {"lm_head.weight"} if config.tie_embed_logits else names


def check_complete(names: Iterable[str], config: ModelConfig, source: object) -> None:
    """Raise `ValueError`, naming them, if `names` (ours) are not exactly the parameters of the model in `source`.

    A model with tied embeddings may come with the output layer's copy.
    """
    found, expected = set(names), parameter_names(config)
    if config.tie_embed_logits:
        found.discard("lm_head.weight")
    for what, difference in {"lacks": expected - found, "has unknown": found - expected}.items():
        if difference:
            some = ", ".join(sorted(map(to_hf, difference))[:5])
            raise ValueError(f"{source} {what} weights: {some}{', ...' if len(difference) > 5 else ''}")


def _translate(name: str, table: dict[str, str]) -> str:
    number = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(number[0], ".{}.", 1) if number else name
    if pattern not in table:
        raise ValueError(f"unknown weight {name}")
    return table[pattern].replace("{}", number[1] if number else "")
