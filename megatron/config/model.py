"""The architecture."""

from dataclasses import dataclass

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option

MODEL_NAMES = ("codellama", "falcon", "gpt", "llama", "llama2", "llama3", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture."""

    model_name: str = option("gpt", "Model family; its preset replaces defaults below.", choices=MODEL_NAMES)
    num_layers: int | None = option(None, "Number of transformer layers.", within="[1, inf)")
    hidden_size: int | None = option(None, "Size of the hidden state.", within="[1, inf)")
    ffn_hidden_size: int | None = option(
        None,
        "Size inside the MLP; by default 4 x hidden size, or two thirds of that, in 64s, with a GLU.",
        within="[1, inf)",
    )
    num_attention_heads: int | None = option(None, "Number of query heads.", within="[1, inf)")
    num_attention_heads_kv: int | None = option(
        None, "Number of key/value heads; by default as many as query heads.", within="[1, inf)"
    )
    kv_channels: int | None = option(None, "Size of a head; by default hidden size / heads.", within="[1, inf)")
    max_position_embeddings: int | None = option(None, "Longest sequence the model is made for.", within="[1, inf)")
    make_vocab_size_divisible_by: int = option(
        128, "No effect: the vocabulary is stored at its true size and divided over ranks as it is.", within="[1, inf)"
    )
    layernorm_epsilon: float = option(1e-5, "Epsilon of the norms.", within="(0, inf)")
    use_bias: bool = option(False, "Give the products biases.")
    add_qkv_bias: bool = option(False, "Give q, k and v biases.")
    qk_layernorm: bool = option(False, "Normalize each head of q and k.")
    use_rms_norm: bool = option(False, "RMSNorm instead of LayerNorm.")
    use_post_ln: bool = option(False, "Norms after the sublayers instead of before.")
    glu_activation: str | None = option(
        None, "Gated activation of the MLP.", choices=("geglu", "liglu", "reglu", "swiglu")
    )
    activation: str = option("gelu", "Activation of an MLP without a GLU.", choices=("gelu", "gelu_tanh"))
    position_embedding_type: str = option("absolute", "How positions are told.", choices=("rotary", "absolute"))
    rope_scaling_factor: float = option(
        1.0, "Stretch of rotary positions; 2 means twice the context.", within="[1, inf)"
    )
    rope_scaling_type: str = option(
        "linear",
        "Which rotary frequencies are stretched: all, or, as in Llama 3.1, slow ones.",
        choices=("linear", "llama3"),
    )
    rope_low_freq_factor: float = option(
        1.0, "llama3: turns slower than the original context / this.", within="(0, inf)"
    )
    rope_high_freq_factor: float = option(4.0, "llama3: faster ones than it / this stay.", within="(0, inf)")
    rope_original_max_position_embeddings: int | None = option(
        None, "llama3: the context before stretching.", within="[1, inf)"
    )
    rope_theta: float = option(10000.0, "Base of the rotary frequencies.", within="(0, inf)")
    parallel_attn: bool = option(False, "Attention and MLP side by side instead of one after the other.")
    parallel_layernorm: bool = option(False, "A norm each for attention and MLP under --parallel_attn.")
    tie_embed_logits: bool = option(True, "Give the output layer weights of its own.")
    sliding_window_size: int | None = option(
        None, "How many tokens, itself included, a token attends to.", within="[1, inf)"
    )
    attention_dropout: float = option(0.1, "Dropout of attention probabilities.", within="[0, 1)")
    hidden_dropout: float = option(0.1, "Dropout of what a sublayer adds to the hidden state.", within="[0, 1)")
    lima_dropout: bool = option(False, "Let hidden dropout rise linearly from 0 at the first layer.")
    init_method_std: float = option(0.02, "Standard deviation of initial weights.", within="[0, inf)")
    init_method_xavier_uniform: bool = option(False, "Xavier-uniform initial weights.")

    def __post_init__(self) -> None:
        check_values(self)
        self._check_heads()
        if self.parallel_layernorm and not self.parallel_attn:
            raise UsageError("--parallel_layernorm needs --parallel_attn")
        if self.parallel_attn and self.use_post_ln:
            raise UsageError("--parallel_attn and --use_post_ln exclude each other")
        if self.rope_scaling_type == "llama3":
            if not self.rope_original_max_position_embeddings:
                raise UsageError("--rope_scaling_type llama3 needs --rope_original_max_position_embeddings")
            if self.rope_low_freq_factor >= self.rope_high_freq_factor:
                raise UsageError(
                    f"--rope_low_freq_factor {self.rope_low_freq_factor} is not below --rope_high_freq_factor "
                    f"{self.rope_high_freq_factor}"
                )

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_attention_heads_kv
        if heads and self.hidden_size and self.kv_channels is None and self.hidden_size % heads:
            raise UsageError(
                f"--hidden_size {self.hidden_size} is not a multiple of --num_attention_heads {heads}; "
                "change one, or give the size of a head by --kv_channels"
            )
        if heads and kv_heads and heads % kv_heads:
            raise UsageError(f"--num_attention_heads {heads} is not a multiple of --num_attention_heads_kv {kv_heads}")
        if self.position_embedding_type == "rotary" and self.kv_channels and self.kv_channels % 2:
            raise UsageError(
                f"--kv_channels {self.kv_channels}, by default --hidden_size / --num_attention_heads, is odd; "
                "rotary positions turn pairs of channels, make it even"
            )
