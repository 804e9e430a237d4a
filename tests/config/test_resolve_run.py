"""Options of a run, merged and checked."""

import json
from typing import Any

import pytest

from megatron.config import UsageError, resolve_run
from megatron.config.resolve import MEANINGS, SHAPES

RUN: dict[str, Any] = {
    "model_name": "llama2",
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "data_type": "instruction",
    "micro_batch_size": 1,
    "train_iters": 5,
    "lr": 1e-3,
}
STORED: dict[str, Any] = {
    "model_name": "llama2",
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 100,
    "num_attention_heads": 4,
    "num_attention_heads_kv": 2,
    "kv_channels": 16,
    "max_position_embeddings": 512,
    "layernorm_epsilon": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling_factor": 2.0,
    "tie_embed_logits": True,
    "seq_length": 256,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
}
NO_ARCHITECTURE = {key: RUN[key] for key in ("data_type", "micro_batch_size", "train_iters", "lr")}


def test_a_preset_replaces_defaults_and_a_flag_replaces_the_preset() -> None:
    assert resolve_run(RUN).model.max_position_embeddings == 4096
    assert resolve_run(RUN).model.hidden_dropout == 0.0
    assert resolve_run({**RUN, "model_name": "codellama"}).model.rope_theta == 1e6
    assert resolve_run({**RUN, "hidden_dropout": 0.2}).model.hidden_dropout == 0.2


def test_sizes_follow_from_others() -> None:
    config = resolve_run(RUN)
    assert (config.model.kv_channels, config.model.num_attention_heads_kv, config.model.ffn_hidden_size) == (64, 4, 640)
    assert config.data.seq_length == 4096
    assert resolve_run({**RUN, "seq_length": 7}).data.seq_length == 7


def test_the_checkpoint_gives_the_architecture() -> None:
    config = resolve_run({**NO_ARCHITECTURE, "load": "x", "use_checkpoint_args": True}, STORED)
    model = {name: getattr(config.model, name) for name in STORED if hasattr(config.model, name)}
    assert model == {name: STORED[name] for name in model}
    assert config.data.seq_length == 256
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.parallel.pipeline_model_parallel_size == 4


def test_a_typed_flag_wins_where_weights_allow_it() -> None:
    typed = {"load": "x", "use_checkpoint_args": True, "rope_scaling_factor": 4.0, "tensor_model_parallel_size": 1}
    config = resolve_run({**NO_ARCHITECTURE, **typed, "seq_length": 512}, STORED)
    assert (config.model.rope_scaling_factor, config.data.seq_length) == (4.0, 512)
    assert config.parallel.tensor_model_parallel_size == 1


@pytest.mark.parametrize("use_checkpoint_args", [True, False])
def test_shapes_that_contradict_the_checkpoint(use_checkpoint_args: bool) -> None:
    flags = {**RUN, **{k: v for k, v in STORED.items() if k != "pipeline_model_parallel_size"}, "load": "x"}
    if use_checkpoint_args:
        flags["use_checkpoint_args"] = True
    resolve_run(flags, STORED)
    with pytest.raises(UsageError, match="--num_layers is 4 here but 3 in the checkpoint"):
        resolve_run({**flags, "num_layers": 4}, STORED)


def test_a_lost_rotary_setting_is_found() -> None:
    flags = {**RUN, **{k: v for k, v in STORED.items() if k != "pipeline_model_parallel_size"}, "load": "x"}
    with pytest.raises(UsageError, match=r"--rope_theta is 10000.0 here but 1000000.0 .* --use_checkpoint_args"):
        resolve_run({**flags, "rope_theta": 10000.0}, STORED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"glu_activation": "geglu"}, "--glu_activation geglu contradicts --model_name llama2"),
        ({"num_layers": None}, "give --num_layers"),
        ({"fp16": True, "bf16": True}, "--fp16 and --bf16"),
        ({"recompute_activations": True, "recompute_granularity": "full"}, "--recompute_activations"),
        ({"recompute_method": "block"}, "--recompute_method needs --recompute_granularity full"),
        ({"recompute_num_layers": 2}, "--recompute_num_layers needs --recompute_granularity full"),
        ({"seed": 2**32}, "--seed 4294967296 is not in [0, 4294967295]"),
        (
            {
                **{"model_name": "gpt", "max_position_embeddings": 64},
                **{"use_post_ln": True, "fp32_residual_connection": True},
            },
            "--use_post_ln and --fp32_residual_connection exclude each other",
        ),
        (
            {"compile": True, "lima_dropout": True, "hidden_dropout": 0.1},
            "--compile and --lima_dropout exclude each other",
        ),
        (
            {"compile": True, "recompute_granularity": "selective", "attention_dropout": 0.1},
            "--compile does not go with --recompute_granularity selective and dropout",
        ),
        ({"save_interval": 3}, "--save_interval needs --save"),
        ({"async_save": True}, "--async_save needs --save"),
        ({"auto_resume": True}, "--auto_resume needs --save"),
        ({"save": "x", "keep_every": 3}, "--keep_every needs --keep_last"),
        ({"rampup_batch_size": (8, 8)}, "--rampup_batch_size takes three numbers"),
        ({"rampup_batch_size": (8, 8, 100)}, "--rampup_batch_size needs --train_samples"),
        (
            {"packing": "padding_free", "calculate_per_token_loss": False},
            "--no_calculate_per_token_loss takes a mean over rows of one sample each",
        ),
        ({"train_samples": 3}, "--train_iters and --train_samples exclude"),
        ({"lr_decay_samples": 3}, "--lr_decay_samples does not go with --train_iters"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}, "--lr_warmup_fraction excludes"),
        ({"data_path": ("a",), "train_data_path": ("b",)}, "--data_path and --train_data_path exclude"),
        ({"num_attention_heads": 3}, "--hidden_size 256 is not a multiple of --num_attention_heads 3"),
        ({"num_attention_heads_kv": 3}, "--num_attention_heads 4 is not a multiple of --num_attention_heads_kv 3"),
        ({"kv_channels": 5}, "--kv_channels 5"),
        ({"rope_scaling_factor": 0.5}, "--rope_scaling_factor 0.5 is below 1"),
        ({"exit_interval": 0}, "--exit_interval 0 is not positive"),
        ({"num_workers": -1}, "--num_workers -1 is below 0"),
        ({"skip_iters": (3, 0)}, "--skip_iters 0 is not positive"),
        ({"lr": float("nan")}, "--lr nan is not in [0, inf)"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0 is not in [0, 1)"),
        ({"lr_warmup_fraction": 1.5}, "--lr_warmup_fraction 1.5 is not in [0, 1]"),
        ({"lr_decay_style": "cubic"}, "--lr_decay_style cubic is none of constant, linear"),
        ({"seq_length": 4097}, "--seq_length 4097 is longer than --max_position_embeddings 4096"),
        ({"end_weight_decay": 0.1}, "--end_weight_decay 0.1 differs from --weight_decay 0.01"),
        ({"weight_decay_incr_style": "linear"}, "needs --start_weight_decay and --end_weight_decay"),
        ({"lr": None}, "give --lr"),
        ({"train_iters": None}, "give --train_iters or --train_samples"),
        ({"micro_batch_size": None}, "--micro_batch_size is missing"),
        ({"use_checkpoint_args": True}, "--use_checkpoint_args needs --load"),
        (
            {"layers_per_pipeline_stage": (2, 2), "num_layers_per_virtual_pipeline_stage": 1},
            "--layers_per_pipeline_stage and --num_layers_per_virtual_pipeline_stage exclude each other",
        ),
        ({"model_name": "falcon", "use_bias": True}, "--use_bias True contradicts --model_name falcon"),
        ({"model_name": "gpt", "parallel_layernorm": True}, "--parallel_layernorm needs --parallel_attn"),
        ({"rope_scaling_type": "llama3"}, "--rope_scaling_type llama3 needs --rope_original_max_position_embeddings"),
        ({"data_path": ("1", "a", "2")}, "--data_path takes one prefix, or weights and prefixes in turns"),
    ],
)
def test_contradictions_name_the_flag(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_run({**RUN, **flags})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "way_out"),
    [
        ({**NO_ARCHITECTURE, "model_name": "llama2", "use_checkpoint_args": True}, "give the --model_name it is of"),
        ({**RUN, **{name: STORED[name] for name in (*SHAPES, *MEANINGS) if name in STORED}}, "--use_checkpoint_args"),
    ],
)
def test_a_checkpoint_of_another_family_is_found(flags: dict[str, Any], way_out: str) -> None:
    with pytest.raises(UsageError, match=rf"sliding_window_size.*{way_out}"):
        resolve_run({**flags, "load": "x"}, {**STORED, "sliding_window_size": 4096})


def test_a_missing_architecture_points_to_the_checkpoint() -> None:
    with pytest.raises(UsageError, match=r"--num_layers --hidden_size .*--use_checkpoint_args"):
        resolve_run({**NO_ARCHITECTURE, "model_name": "llama2", "load": "x"}, STORED)


def test_the_family_of_the_checkpoint_binds_like_a_typed_one() -> None:
    flags = {**NO_ARCHITECTURE, "load": "x", "use_checkpoint_args": True, "use_bias": True}
    with pytest.raises(UsageError, match="--use_bias True contradicts --model_name llama2"):
        resolve_run(flags, STORED)


def test_written_down_without_secrets() -> None:
    config = resolve_run({**RUN, "wandb_api_key": "secret", "skip_iters": (1, 2), "data_path": ("x",)})
    written = json.loads(json.dumps(config.to_dict()))
    assert "secret" not in str(written)
    assert written["training"]["skip_iters"] == [1, 2]
    assert written["model"]["num_layers"] == 2
