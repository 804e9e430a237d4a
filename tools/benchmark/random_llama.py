"""The run that benchmarks train: a Llama of any size with random weights."""

from typing import Any

VOCABULARY = 32000


def run_options(num_layers: int, hidden_size: int, seq_length: int) -> dict[str, Any]:
    """Its flags by field name, for samples of at most so many tokens."""
    return {
        "model_name": "llama2",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": max(hidden_size // 64, 2),
        "ffn_hidden_size": hidden_size * 11 // 4,
        "max_position_embeddings": seq_length,
        "tie_embed_logits": False,
        "data_type": "instruction",
        "tokenizer_type": "SentencePieceTokenizer",
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "train_iters": 1000,
        "lr": 1e-5,
        "lr_decay_style": "constant",
    }
