"""From a command line, a family preset and a checkpoint to the options of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from megatron.config.errors import UsageError
from megatron.config.families import FAMILIES, Family
from megatron.config.model import ModelConfig
from megatron.config.option import flags_of
from megatron.config.parser import parse_flags, with_underscores
from megatron.config.reference_flags import sort_out
from megatron.config.run import RUN_GROUPS, RunConfig

SHAPES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_attention_heads_kv"),
    *("kv_channels", "tie_embed_logits", "use_rms_norm", "glu_activation", "use_bias", "add_qkv_bias", "qk_layernorm"),
    *("position_embedding_type", "parallel_attn", "parallel_layernorm", "use_post_ln"),
)
"""Fields that decide the shapes of the weights."""
MEANINGS = (
    *("rope_theta", "rope_scaling_factor", "rope_scaling_type", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_original_max_position_embeddings", "layernorm_epsilon", "activation", "sliding_window_size"),
)
"""Fields that change what the weights mean; they differ from the checkpoint only if that is said."""
ARCHITECTURE = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
"""Fields without a default."""


def parse_run(
    argv: Sequence[str], *, prog: str, description: str, further: Sequence[type] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The typed flags of a training run, and of `further` groups, and lines to tell the user of flags without effect.

    Raises:
        UsageError: an unknown, refused or malformed flag.
    """
    split = sort_out([with_underscores(word) for word in argv])
    if split.refusal:
        raise UsageError(split.refusal)
    return parse_flags(split.argv, (*further, *RUN_GROUPS), prog=prog, description=description), split.notes


def resolve_run(typed: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> RunConfig:
    """The options of a run: field defaults < family preset < checkpoint < typed flags.

    Args:
        typed: field name -> value, of the flags that were given.
        stored: the same, of the architecture (and `seq_length`, parallel sizes) in the checkpoint of `--load`. Its
            values are taken with `use_checkpoint_args`; without, they are only compared.

    Raises:
        UsageError: something is missing, contradicts something else, or does not fit the checkpoint.
    """
    takes_stored = bool(typed.get("use_checkpoint_args"))
    values = {**(stored if stored and takes_stored else {}), **typed}
    if takes_stored and stored:
        _compare({name: typed[name] for name in SHAPES if name in typed}, stored, "leave the flag out")
    family = FAMILIES.get(values.get("model_name", ModelConfig.model_name))
    if family:
        _check_required(family, values, typed)
        values = {**family.requires, **family.advises, **values}
    values = {"packing": _packing(values), **_derived(values, loads="load" in typed)}
    if stored and not takes_stored:
        names = (*SHAPES, *MEANINGS, *(family.requires if family else ()))
        checked = {name: values[name] for name in names if name in values}
        _compare(checked, stored, "take the checkpoint's values by --use_checkpoint_args")
    return RunConfig.from_fields(values)


def flag_of(name: str) -> str:
    """The flag of the run's option `name`."""
    return next(flag.flag for group in RUN_GROUPS for flag in flags_of(group) if flag.name == name)


def _check_required(family: Family, values: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """`UsageError` where a typed flag or the checkpoint contradicts what the family requires."""
    for name, value in family.requires.items():
        if values.get(name, value) == value:
            continue
        model = f"--model_name {values['model_name']}, which has {name} = {value}"
        if name in typed:
            raise UsageError(f"{flag_of(name)} {typed[name]} contradicts {model}; leave the flag out")
        raise UsageError(f"the checkpoint has {name} = {values[name]}, not {model}; give the --model_name it is of")


def _packing(values: Mapping[str, Any]) -> str:
    """The layout of rows where none is asked for; a mean of means is the reference's over rows of one sample."""
    is_free = values.get("variable_seq_lengths") and values.get("calculate_per_token_loss", True)
    return "padding_free" if is_free else "none"


def _derived(values: Mapping[str, Any], loads: bool) -> dict[str, Any]:
    """Fill in the sizes that follow from others."""
    model = ModelConfig(**{f.name: values[f.name] for f in fields(ModelConfig) if f.name in values})
    missing = [f"--{name}" for name in ARCHITECTURE if getattr(model, name) is None]
    if missing and model.model_name in FAMILIES:
        way_out = "; or take them from the checkpoint by --use_checkpoint_args" if loads else ""
        raise UsageError(f"the architecture is not complete, give {' '.join(missing)}{way_out}")
    if missing:
        return dict(values)
    assert model.hidden_size and model.num_attention_heads
    full = replace(
        model,
        ffn_hidden_size=model.ffn_hidden_size or default_ffn_size(model.hidden_size, model.glu_activation is not None),
        num_attention_heads_kv=model.num_attention_heads_kv or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
    )
    sequence = {"seq_length": values.get("seq_length") or full.max_position_embeddings}
    return {**values, **sequence, **{f.name: getattr(full, f.name) for f in fields(ModelConfig)}}


def default_ffn_size(hidden_size: int, gated: bool) -> int:
    """Size inside the MLP: 4 x hidden; a gated one has three matrices instead of two, so two thirds of that, in 64s."""
    if not gated:
        return 4 * hidden_size
    return max(int(4 * hidden_size * 2 / 3) // 64, 1) * 64


def _compare(values: Mapping[str, Any], stored: Mapping[str, Any], way_out: str) -> None:
    for name, value in values.items():
        if name in stored and stored[name] != value:
            raise UsageError(f"{flag_of(name)} is {value} here but {stored[name]} in the checkpoint; {way_out}")
