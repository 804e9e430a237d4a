"""Flags of Megatron-LLM that are no option here: accepted without effect, other names, refused, and those to come."""

from dataclasses import dataclass

ACCEPTED = {
    "--distribute_saved_activations": "under --sequence_parallel saved activations are divided anyway",
    "--no_masked_softmax_fusion": "attention is one fused kernel",
    "--no_bias_gelu_fusion": "there is no such fusion to switch off",
    "--no_bias_dropout_fusion": "there is no such fusion to switch off",
    "--no_async_tensor_model_parallel_allreduce": "gradients of inputs are always reduced beside those of weights",
    "--no_persist_layer_norm": "PyTorch chooses the norm's kernel",
    "--no_gradient_accumulation_fusion": "gradients are always accumulated in fp32",
    "--accumulate_allreduce_grads_in_fp32": "gradients are always accumulated and reduced in fp32",
    "--fp16_lm_cross_entropy": "the cross entropy is always computed in fp32",
    "--DDP_impl=": "data parallelism is PyTorch's FSDP2",
    "--no_contiguous_buffers_in_local_ddp": "data parallelism is PyTorch's FSDP2",
    "--no_scatter_gather_tensors_in_pipeline": "each rank sends only what the next stage needs",
    "--use_ring_exchange_p2p": "stages exchange by point-to-point messages",
    "--local_rank=": "the launcher's environment says it",
    "--use_cpu_initialization": "initial weights are the same on any device",
    "--empty_unused_memory_level=": "PyTorch's allocator keeps its memory",
    "--adlr_autoresume": "it belongs to one cluster of the reference's authors",
    "--adlr_autoresume_interval=": "it belongs to one cluster of the reference's authors",
    "--barrier_with_L1_time": "timers wait for the device, not for other ranks",
    "--no_fp8_wgrad": "FP8 is not available yet",
    "--fp8_margin=": "FP8 is not available yet",
    "--fp8_interval=": "FP8 is not available yet",
    "--transformer_impl=": "there is one implementation, of this toolkit",
    "--fp8_amax_history_len=": "FP8 is not available yet",
    "--fp8_amax_compute_algo=": "FP8 is not available yet",
    "--model_type=": "every family here is a decoder",
}
"""Flag, with "=" where it takes a value -> why it has no effect."""

ALIASES = {"--encoder_seq_length": "--seq_length", "--tokenizer_model": "--vocab_file"}
"""Flag -> the flag it is another name for."""

LATER = {"--fp8_e4m3": "FP8", "--fp8_hybrid": "FP8"}
"""Flag -> what is not available yet."""

REFUSED_FAMILIES = {
    "encoder-decoder models (BERT, T5)": (
        "encoder_num_layers decoder_num_layers decoder_seq_length pipeline_model_parallel_split_rank "
        "standalone_embedding_stage mask_prob short_seq_prob"
    ),
    "retrieval models": (
        "retriever_seq_length sample_rate ict_head_size biencoder_projection_dim biencoder_shared_query_context_model "
        "ict_load bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path "
        "retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path indexer_batch_size "
        "indexer_log_interval"
    ),
    "vision models": (
        "num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction no_data_sharding "
        "head_lr_mult iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size "
        "dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp "
        "dino_warmup_teacher_temp_epochs"
    ),
    "export to ONNX": "onnx_safe",
    "residual connections after the norm": "apply_residual_connection_post_layernorm",
    "inference inside the trainer": "inference_batch_times_seqlen_threshold max_tokens_to_oom",
}
REFUSED = {f"--{name}": what for what, names in REFUSED_FAMILIES.items() for name in names.split()}
"""Flag -> what it belongs to, which this toolkit does not have."""


@dataclass(frozen=True)
class Sorted:
    """A command line without the flags of this file: what is left, and what to tell the user."""

    argv: list[str]
    notes: list[str]
    refusal: str | None = None


def sort_out(argv: list[str]) -> Sorted:
    """Take the flags of this file out of a command line whose flag names have underscores."""
    rest: list[str] = []
    notes: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in REFUSED:
            return Sorted(
                argv, notes, f"{name} belongs to {REFUSED[name]}, which this toolkit does not have; remove it"
            )
        if name in LATER:
            return Sorted(argv, notes, f"{name}: {LATER[name]} is not available yet; remove it")
        if name in ACCEPTED or f"{name}=" in ACCEPTED:
            takes_value = f"{name}=" in ACCEPTED
            has_value = bool(equals) or (takes_value and not next(words, "--").startswith("--"))
            if has_value != takes_value:
                return Sorted(
                    argv, notes, f"{name} takes {'a' if takes_value else 'no'} value; it has no effect: remove it"
                )
            notes.append(f"{name} has no effect: {ACCEPTED.get(name) or ACCEPTED[f'{name}=']}")
            continue
        rest.append(ALIASES.get(name, name) + equals + value)
    return Sorted(rest, notes)
