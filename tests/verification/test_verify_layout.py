"""The tool that compares a layout with one device: it passes where training is right, and names what is planted."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import World

import megatron.data.plan as data_plan
import megatron.parallel.build as build
import megatron.parallel.engine as engine
import megatron.training.persistence as persistence
import megatron.training.saver as saver
from megatron.config import resolve_run, run_entry
from megatron.data import MicroBatch
from megatron.model import Model
from megatron.parallel.build import local_tensor
from megatron.parallel.engine import Engine
from megatron.verification import verified_flags, verify
from megatron.verification.rows import PACKED, RESUMED

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model_name": "llama2",
    "num_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_attention_heads_kv": 2,
    "max_position_embeddings": 4096,
    "variable_seq_lengths": True,
}
ARGV = [word for name, value in MODEL.items() for word in (f"--{name}", str(value)) if word != "True"]
TP2 = {"tensor_model_parallel_size": 2}
MQA = {"num_attention_heads_kv": 1}
TP4 = {"tensor_model_parallel_size": 4}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
TIED = {"tie_embed_logits": True}
THETA = {"rope_theta": 1e6}


def planted_in_parts(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Gradients are completed as if every part were another."""
    complete = Engine._complete_gradients

    def planted(self: Engine) -> None:
        model = self.model
        self.model = replace(model, parts=[replace(part, **changes) for part in model.parts])
        complete(self)
        self.model = model

    patch.setattr(Engine, "_complete_gradients", planted)


def partial_gradients_stay(patch: pytest.MonkeyPatch) -> None:
    planted_in_parts(patch, gradient_is_partial=False)


def tied_embeddings_stay(patch: pytest.MonkeyPatch) -> None:
    planted_in_parts(patch, other_stage=None)


def gradients_are_averaged(patch: pytest.MonkeyPatch) -> None:
    complete = Engine._complete_gradients

    def planted(self: Engine) -> None:
        complete(self)
        for part in self.model.parts:
            local_tensor(part.parameter.grad).mul_(1 / self.mesh.size("dp"))

    patch.setattr(Engine, "_complete_gradients", planted)


def planted_divisors(
    patch: pytest.MonkeyPatch, divisors: Callable[[list[MicroBatch], list[float]], list[float]]
) -> None:
    passes = engine._StagePasses
    patch.setattr(
        engine,
        "_StagePasses",
        lambda **options: passes(**{**options, "divisors": divisors(options["micro_batches"], options["divisors"])}),
    )


def micro_batches_divide(patch: pytest.MonkeyPatch) -> None:
    planted_divisors(patch, lambda rows, _: [float(one.weights.sum()) or 1.0 for one in rows])


def divisor_is_doubled(patch: pytest.MonkeyPatch) -> None:
    planted_divisors(patch, lambda _, divisors: [2 * divisor for divisor in divisors])


def samples_see_each_other(patch: pytest.MonkeyPatch) -> None:
    free = data_plan.LAYOUTS["padding_free"]

    def rows(samples: Any, options: Any) -> MicroBatch:
        row = free.rows(samples, options)
        return replace(row, cu_seqlens=np.array([0, len(row.tokens)], np.int32), max_seqlen=len(row.tokens))

    patch.setitem(data_plan.LAYOUTS, "padding_free", replace(free, rows=rows))


def planted_in_model(patch: pytest.MonkeyPatch, **settings: Any) -> None:
    patch.setattr(build, "Model", lambda config, *args, **options: Model(replace(config, **settings), *args, **options))


def theta_is_not_built(patch: pytest.MonkeyPatch) -> None:
    planted_in_model(patch, rope_theta=10000.0)


def scaling_is_not_built(patch: pytest.MonkeyPatch) -> None:
    planted_in_model(patch, rope_scaling_factor=1.0)


def theta_is_not_saved(patch: pytest.MonkeyPatch) -> None:
    describe = saver.Saver._description

    def planted(*args: Any) -> dict[str, Any]:
        run = describe(*args)
        del run["config"]["model"]["rope_theta"]
        return run

    patch.setattr(saver.Saver, "_description", planted)


def final_norm_is_not_saved(patch: pytest.MonkeyPatch) -> None:
    slices = saver.model_slices
    patch.setattr(saver, "model_slices", lambda model: [s for s in slices(model) if s.name != "final_norm.weight"])


def optimizer_is_not_loaded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(persistence, "load_optimizer", lambda *args: None)


ONLY = {"theta_is_not_saved": RESUMED, "optimizer_is_not_loaded": RESUMED, "samples_see_each_other_elsewhere": PACKED}
"""Plants that spoil a single row of the table."""


def samples_see_each_other_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """Not in the layout that is verified, but in the other one that it is compared with."""
    samples_see_each_other(patch)


def verified(flags: dict[str, Any], plant: Callable[[pytest.MonkeyPatch], None] | None = None) -> tuple[bool, str]:
    """On each rank: whether the layout of `flags` passes, and what was said."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        if plant:
            plant(patch)
        passes = verify(resolve_run(verified_flags({**MODEL, **flags})))
    return passes, output.getvalue()


def command(argv: list[str], plant: Callable[[pytest.MonkeyPatch], None] | None = None) -> tuple[int, str]:
    """On each rank: exit code and output of the tool."""
    main = runpy.run_path(str(ROOT / "tools" / "verify_layout.py"))["main"]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if plant:
            plant(patch)
        try:
            code = run_entry(main, [*ARGV, *argv])
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
    return code, output.getvalue()


def failed_rows(output: str) -> set[str]:
    return {match.strip() for match in re.findall(r"^(.{37}) .* FAILED ", output, flags=re.M)}


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, {**MQA, "recompute_granularity": "selective"}),
        (1, {"optimizer": "sgd", "packing": "none"}),
        (2, {"calculate_per_token_loss": False, "full_sharding": True}),
        (2, {**TP2, **SP, **THETA, "kv_channels": 64, "bf16": True}),
        (2, {"fp16": True, "scalar_loss_mask": 0.5}),
        (4, {**TP4, **SP, "rope_scaling_factor": 2.0, "recompute_granularity": "full"}),
        (4, {**PP2, **TIED, "num_layers_per_virtual_pipeline_stage": 2, "micro_batch_size": 1}),
        (4, {**PP2, **TP2, "layers_per_pipeline_stage": (3, 5)}),
        (2, {**TP2, **SP, "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}),
    ],
    ids=str,
)
def test_passes(world: World, size: int, flags: dict[str, Any]) -> None:
    results = world(size, verified, flags)
    assert all(passes for passes, _ in results), results[0][1]
    assert "\nok: on this layout training is what it is on one device" in results[0][1]
    assert [output for _, output in results[1:]] == [""] * (size - 1)


@pytest.mark.parametrize(
    ("size", "flags", "plant", "words"),
    [
        (2, {**TP2, **SP}, partial_gradients_stay, "gradients of norms are not summed over tensor-parallel ranks"),
        (2, {**TP2, **SP, **MQA}, partial_gradients_stay, "gradients of attention q, k, v and norms are not"),
        (
            2,
            {**PP2, **TIED},
            tied_embeddings_stay,
            "gradients of the tied embedding are not summed over the first",
        ),
        (2, {}, gradients_are_averaged, "all gradients are 0.5 (1 / the number of data-parallel ranks or"),
        (2, {"micro_batch_size": 1}, micro_batches_divide, "each micro batch is divided by its own weights instead"),
        (2, {}, divisor_is_doubled, "times what they should be, and so is the loss: its divisor is wrong"),
        (1, {}, samples_see_each_other, "samples of a packed row see each other"),
        (2, {**TP2, "packing": "none"}, samples_see_each_other_elsewhere, "samples of a packed row see each other"),
        (2, {**PP2, **THETA}, theta_is_not_built, "--rope_theta 1e+06 lost"),
        (1, {"rope_scaling_factor": 4.0}, scaling_is_not_built, "--rope_scaling_factor 4 lost"),
        (2, {**TP2, **THETA}, theta_is_not_saved, "run.json: --rope_theta 1000000.0 became 10000.0"),
        (1, {}, final_norm_is_not_saved, "the checkpoint cannot be resumed: "),
        (1, {}, optimizer_is_not_loaded, "the optimizer's state: weights and settings came back"),
        (2, {"bf16": True, **TP2, **SP}, partial_gradients_stay, "gradients of norms are not summed"),
        (1, {"bf16": True, **THETA}, theta_is_not_saved, "--rope_theta 1000000.0 became 10000.0"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_names_what_is_wrong(
    world: World, size: int, flags: dict[str, Any], plant: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    results = world(size, verified, flags, plant)
    output = results[0][1]
    assert not any(passes for passes, _ in results), output
    causes = re.findall(r"^  cause: (.*)", output, flags=re.M)
    assert len(causes) == 1, output
    assert words in causes[0], output
    only = ONLY.get(plant.__name__)
    assert only is None or failed_rows(output) == {only}, output


def test_exit_codes(world: World) -> None:
    assert [code for code, _ in world(2, command, [])] == [0, 0]
    assert [code for code, _ in world(2, command, [], divisor_is_doubled)] == [1, 1]
    code, output = world(2, command, ["--tensor_model_parallel_size", "3"])[0]
    assert code == 2
    assert "--tensor_model_parallel_size 3 does not divide the 8 attention heads of llama2" in output


def test_as_a_user(tmp_path: Path) -> None:
    """Without data, from another folder, which stays empty; flags of data and logs are passed over."""
    unused = ["--data_path", "nowhere", "--save", "out", "--tensorboard_dir", "out", "--log_interval", "1"]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(ROOT / "tools" / "verify_layout.py"), *ARGV, *unused),
            *("--tensor_model_parallel_size", "2", "--sequence_parallel"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("2 ranks on cpu: 2 tensor x 1 pipeline x 1 data; sequence parallel, packing")
    assert list(tmp_path.iterdir()) == []
