"""The command line is the reference's: every one of its flags, by its treatment."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config.option import Flag, flags_of
from megatron.config.reference_flags import ACCEPTED, ALIASES, LATER, REFUSED
from megatron.config.run import RUN_GROUPS

OTHER_DEFAULTS = {"--wandb_entity": "the reference's is its authors' own team"}
"""Flag -> why its default is not the reference's."""
OURS = {
    *("--packing", "--drop_long_samples", "--no_calculate_per_token_loss", "--full_sharding", "--compile"),
    *("--layers_per_pipeline_stage", "--peak_tflops", "--add_qkv_bias", "--qk_layernorm", "--activation"),
    *("--rope_scaling_type", "--rope_low_freq_factor", "--rope_high_freq_factor"),
    "--rope_original_max_position_embeddings",
    *("--distributed_timeout_minutes", "--max_consecutive_skips", "--rewind_on_spike", "--max_rewinds"),
    *("--async_save", "--keep_last", "--keep_every", "--auto_resume", "--no_verify_checkpoint"),
}
NEW_CHOICES = {"HFTokenizer", "llama3", "qwen2", "qwen3"}
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "enum": str}


@pytest.fixture(scope="module")
def reference(shared_data: Path) -> list[dict[str, Any]]:
    return json.loads((shared_data / "reference" / "flags.json").read_text())


def options() -> dict[str, Flag]:
    return {flag.flag: flag for group in RUN_GROUPS for flag in flags_of(group)}


def named(reference: list[dict[str, Any]], treatment: str) -> set[str]:
    return {row["flag"] for row in reference if row["treatment"].startswith(treatment)}


def test_every_flag_has_its_treatment(reference: list[dict[str, Any]]) -> None:
    assert set(options()) == named(reference, "kept") | OURS
    assert {flag.rstrip("=") for flag in ACCEPTED} == named(reference, "accepted")
    assert set(REFUSED) == named(reference, "refused")
    assert set(LATER) == named(reference, "later")
    aliases = {
        row["flag"]: row["treatment"].removeprefix("alias of ") for row in reference if "alias" in row["treatment"]
    }
    assert aliases == ALIASES


def test_kept_flags_take_the_same_values(reference: list[dict[str, Any]]) -> None:
    for row in reference:
        if row["treatment"] != "kept":
            continue
        flag = options()[row["flag"]]
        assert flag.is_switch == (row["nargs"] == 0), row["flag"]
        assert flag.repeated == (row["nargs"] in ("*", "+")), row["flag"]
        if row["type"] in TYPES:
            assert flag.kind is TYPES[row["type"]], row["flag"]
        if row["choices"]:
            assert set(flag.details["choices"]) - NEW_CHOICES == set(row["choices"]), row["flag"]


def test_kept_flags_have_the_same_default(reference: list[dict[str, Any]]) -> None:
    for row in reference:
        if row["treatment"] != "kept" or row["flag"] in OTHER_DEFAULTS:
            continue
        flag = options()[row["flag"]]
        if row["kind"] == "StoreTrue":  # given it says True there; here a positive field may say the opposite
            assert flag.default is flag.turns_off, row["flag"]
        else:
            assert flag.default == (tuple(row["default"]) if row["default"] == [] else row["default"]), row["flag"]


def test_accepted_flags_take_a_value_where_the_reference_does(reference: list[dict[str, Any]]) -> None:
    for row in reference:
        if row["treatment"] == "accepted":
            assert (f"{row['flag']}=" in ACCEPTED) == (row["nargs"] != 0), row["flag"]
