"""The tiny runs that tests of parallelism train on the mesh and plainly."""

from typing import Any

from megatron.config import RunConfig, resolve_run
from megatron.data import Samples, build_splits
from megatron.verification.yardstick import RandomSamples

VOCAB_SIZE = 101
TINY: dict[str, Any] = {
    "model_name": "llama2",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_attention_heads_kv": 2,
    "max_position_embeddings": 64,
    "seq_length": 24,
    "init_method_std": 0.1,  # larger, rounding grows from layer to layer
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 10,
    "lr": 0.003,
    "lr_decay_style": "constant",
    "clip_grad": 0.5,
    "adam_eps": 1e-4,  # so that Adam does not blow up the rounding of gradients near zero
    "weight_decay": 0.1,
    "data_type": "instruction",
    "variable_seq_lengths": True,
    "tokenizer_type": "SentencePieceTokenizer",
    "scalar_loss_mask": 0.25,
}
"""Flags of a run small enough for real ranks on two cores."""


def training_samples(config: RunConfig) -> Samples:
    """Those of `--train_data_path`; without it random ones of various lengths, some longer than a row."""
    if config.data.train_data_path:
        return build_splits(config.data, config.training.seed).require("train").datasets[0]
    return RandomSamples(count=40, longest=30, vocab_size=VOCAB_SIZE, data=config.data)


def tiny_config(**flags: Any) -> RunConfig:
    """A tiny run with some flags changed."""
    return resolve_run({**TINY, **flags})
