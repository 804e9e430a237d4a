"""Rotary settings in config.json, where transformers 4 or 5 write them, and ours."""

import math
from collections.abc import Mapping
from typing import Any

from megatron.config import ModelConfig

DEFAULT_THETA = 10000.0
PLACES = ("rope_scaling", "rope_parameters")
"""Where transformers 4 and 5 write rotary settings; the former has `rope_theta` beside it, the latter in it."""
SCALINGS = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_max_position_embeddings",
    },
}
"""Type of scaling -> its settings: their key -> our field."""


def read_rotary(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Our rotary fields of config.json.

    Raises:
        ValueError: a setting is missing, no number, of an unknown kind, or contradicts another.
    """
    places = []
    for key in PLACES:
        if config.get(key):
            if not isinstance(config[key], Mapping):
                raise ValueError(f"{source}: {key} is {config[key]!r}, not an object")
            places.append(config[key])
    scalings = [_scaling(settings, source) for settings in places]
    thetas = {theta for place in (config, *places) if (theta := read_number(place, "rope_theta", source)) is not None}
    if any(scaling != scalings[0] for scaling in scalings) or len(thetas) > 1:
        raise ValueError(f"{source}: rope_theta, {' and '.join(PLACES)} contradict each other")
    unscaled = {"rope_scaling_type": "linear", "rope_scaling_factor": 1.0}
    return {"rope_theta": thetas.pop() if thetas else DEFAULT_THETA, **unscaled, **(scalings[0] if scalings else {})}


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Rotary keys of config.json, in the words of both."""
    is_scaled = model.rope_scaling_type != "linear" or model.rope_scaling_factor != 1.0
    kind = model.rope_scaling_type if is_scaled else "default"
    settings = {"rope_type": kind, **{theirs: getattr(model, ours) for theirs, ours in SCALINGS[kind].items()}}
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": settings if is_scaled else None,
        "rope_parameters": {"rope_theta": model.rope_theta, **settings},
    }


def _scaling(settings: Mapping[str, Any], source: object) -> dict[str, Any]:
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        known = ", ".join(map(repr, SCALINGS))
        raise ValueError(f"{source}: rotary scaling of type {kind!r} is not supported; only {known}")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor {settings['partial_rotary_factor']} is not supported")
    fields: dict[str, Any] = {}
    for theirs, ours in SCALINGS[kind].items():
        number = read_number(settings, theirs, source)
        if number is None:
            raise ValueError(f"{source}: rotary scaling is {kind!r}, but its {theirs} is missing")
        if ours.endswith("embeddings") and not number.is_integer():
            raise ValueError(f"{source}: {theirs} is {number}, not a whole number")
        fields[ours] = int(number) if ours.endswith("embeddings") else number
    return {"rope_scaling_type": kind, **fields} if fields else {}


def read_number(settings: Mapping[str, Any], key: str, source: object) -> float | None:
    """The number that a key has; None if it is left out or null.

    Raises:
        ValueError: it is no number.
    """
    value = settings.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{source}: {key} is {value!r}, not a number")
    return float(value)
