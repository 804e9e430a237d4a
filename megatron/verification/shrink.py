"""From the flags of a run to a tiny run with the same layout and the same settings."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from megatron.config import (
    CheckpointConfig,
    DataConfig,
    KernelConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.parallel.mesh import Layout
from megatron.parallel.plan import key_value_heads, virtual_stages

GROUPS_KEPT = (ModelConfig, OptimizerConfig, PrecisionConfig, ParallelConfig, RecomputeConfig, KernelConfig)
FLAGS_KEPT = {
    *("micro_batch_size", "seed", "calculate_per_token_loss"),
    *("seq_length", "variable_seq_lengths", "scalar_loss_mask", "packing"),
    *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("load", "load_iters", "use_checkpoint_args"),
    *(field.name for group in GROUPS_KEPT for field in fields(group)),
}
"""Flags that say something about a layout. Others are about files, logs and the length of a run."""
STEPS = 3
SUPPLIED = {"micro_batch_size": 2}
"""What a run needs, where it is not given."""
FIXED = {"train_iters": STEPS, "lr": 0.001, "data_type": "instruction"}
"""What every verification has. With a higher learning rate rounding grows too fast from step to step."""

HEAD_SIZE = 8
SEQ_LENGTH, MAX_POSITIONS, WINDOW = 24, 64, 8
LEAST_VOCABULARY = 101
LEAST_SAMPLES = 8
FP16_LOSS_SCALE = 1024.0


def verified_flags(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The typed flags that matter to a layout, and what a run needs besides; ready for `resolve_run`."""
    return {**SUPPLIED, **{name: value for name, value in typed.items() if name in FLAGS_KEPT}, **FIXED}


def vocabulary(tensor_size: int) -> int:
    """A vocabulary that several tensor-parallel ranks cannot share evenly, though each has some of it."""
    return tensor_size * -(-LEAST_VOCABULARY // tensor_size) - 1


def shrink(config: RunConfig, layout: Layout) -> RunConfig:
    """The tiny run that stands for `config` on `layout`.

    | what                  | becomes                                                                        |
    |-----------------------|--------------------------------------------------------------------------------|
    | layers                | 1 and 2 in turn on the virtual stages, which stay as many; 2 without pipeline  |
    | heads, hidden size    | see `small_model`                                                              |
    | vocabulary            | see `vocabulary`                                                               |
    | sequence length       | 24, for samples of up to 30 tokens; a sliding window 8                         |
    | global batch          | 2 micro batches a data-parallel rank, more where these are fewer than pipeline |
    |                       | stages or 8 samples; and 1 sample, so that nothing divides, but not for a mean |
    |                       | of means                                                                       |
    | optimizer             | the same; Adam's epsilon 1e-4, so that it does not blow up the rounding of     |
    |                       | gradients near 0; weight decay 0.1 and clipping at 0.5, so that both show      |
    | schedule              | constant, 0.001                                                                |
    | dropout               | 0: its masks depend on the layout                                              |
    | initial weights       | standard deviation 0.2, so that settings such as the rotary base matter        |
    | fp16                  | a constant loss scale of 1024, so that no step is skipped                      |
    | data, tokenizer, logs | none                                                                           |
    | everything else       | the same                                                                       |
    """
    assert config.model.num_layers
    stages = len(virtual_stages(config.parallel, config.model.num_layers))
    layers = tuple(1 + stage % 2 for stage in range(stages)) if stages > 1 else (2,)
    return replace(
        config,
        model=replace(small_model(config.model, layout.tensor), num_layers=sum(layers)),
        parallel=replace(config.parallel, layers_per_pipeline_stage=layers, num_layers_per_virtual_pipeline_stage=None),
        training=_training(config.training, layout),
        optimizer=replace(
            config.optimizer,
            adam_eps=1e-4,
            clip_grad=min(config.optimizer.clip_grad, 0.5),
            weight_decay=0.1,
            start_weight_decay=None,
            end_weight_decay=None,
            weight_decay_incr_style="constant",
        ),
        schedule=ScheduleConfig(lr=config.schedule.lr, lr_decay_style="constant"),
        precision=replace(config.precision, loss_scale=FP16_LOSS_SCALE if config.precision.fp16 else None),
        data=DataConfig(
            data_type="instruction",
            seq_length=SEQ_LENGTH,
            variable_seq_lengths=config.data.variable_seq_lengths,
            scalar_loss_mask=config.data.scalar_loss_mask,
            packing=config.data.packing,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
            eod_mask_loss=config.data.eod_mask_loss,
            num_workers=0,
        ),
        tokenizer=TokenizerConfig(),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )


def _training(training: TrainingConfig, layout: Layout) -> TrainingConfig:
    assert training.micro_batch_size
    unit, per_token = layout.data * training.micro_batch_size, training.calculate_per_token_loss
    samples = max(2, layout.pipeline, -(-LEAST_SAMPLES // unit)) * unit
    return TrainingConfig(
        micro_batch_size=training.micro_batch_size,
        global_batch_size=samples + 1 if per_token else samples,
        train_iters=STEPS,
        seed=training.seed,
        calculate_per_token_loss=per_token,
    )


def small_model(model: ModelConfig, tensor_size: int) -> ModelConfig:
    """The same architecture with as few heads as `tensor_size` ranks can share in the same way; layers are unchanged.

    | key/value heads                   | become                             | query heads become |
    |-----------------------------------|------------------------------------|--------------------|
    | as many as query heads (MHA)      | 2 x ranks                          | the same           |
    | fewer than ranks: replicated      | the same                           | 2 x ranks          |
    | one for all (MQA)                 | the same                           | 2 x ranks          |
    | as many as ranks, or more (GQA)   | 1 or, where a rank has more, 2 a rank | twice as many   |

    A head has 8 channels. The hidden size is that of all heads, or larger or smaller than that, as it was. The MLP has
    12 channels a rank.
    """
    heads, kv_heads = model.num_attention_heads, key_value_heads(model)
    assert heads and model.hidden_size and model.kv_channels
    if kv_heads == heads:
        small_heads = small_kv_heads = 2 * tensor_size
    else:
        small_kv_heads = kv_heads if kv_heads < tensor_size else tensor_size * min(kv_heads // tensor_size, 2)
        small_heads = 2 * max(tensor_size, small_kv_heads)
    inside = heads * model.kv_channels
    hidden_a_head = HEAD_SIZE * (2 if model.hidden_size == inside else 3 if model.hidden_size > inside else 1) // 2
    return replace(
        model,
        hidden_size=small_heads * hidden_a_head,
        ffn_hidden_size=12 * tensor_size,
        num_attention_heads=small_heads,
        num_attention_heads_kv=small_kv_heads,
        kv_channels=HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window_size=WINDOW if model.sliding_window_size else None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
    )
