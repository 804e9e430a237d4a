"""Optimizer state is cut as its weights, bit for bit, and is left out where it is asked to be."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import CONFIG, VOCAB_SIZE, contents, random_state, rows_of_rank, run_of, same
from torch import Tensor

from megatron.checkpoint import Slice, begin_checkpoint, open_checkpoint
from megatron.checkpoint.integrity import manifest_bytes, read_manifest
from megatron.checkpoint.reshard import Layout, reshard
from megatron.checkpoint.save import state_name
from megatron.hf.rows import to_hf
from megatron.parallel.plan import stage_of, tensor_ranges

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = random_state()
KEYS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
RUN = {**run_of(100), "loss_scale": {"scale": 1024.0, "good_steps": 7, "tolerance": 1}}


def tool(name: str) -> Callable[[list[str]], None]:
    """The main function of a script in tools/."""
    main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]
    return main


checkpoint_util, megatron_to_hf = map(tool, ("checkpoint_util", "megatron_to_hf"))


def random_optimizer(optimizer: str) -> dict[str, Tensor]:
    """Random state of every weight, by our names."""
    return {f"{key}.{n}": t for seed, key in enumerate(KEYS[optimizer], 1) for n, t in random_state(seed).items()}


def saved(folder: Path, optimizer: str, weights: dict[str, Tensor] = WEIGHTS) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as two ranks leave it, and its optimizer state."""
    state = random_optimizer(optimizer)

    def of(rank: int, tensors: dict[str, Tensor]) -> list[Slice]:
        return [rows_of_rank(name, tensor, rank, 2) for name, tensor in tensors.items()]

    stores = {"model": weights, "optimizer": state}
    files = {f"{store}/rank-{rank}.safetensors": of(rank, t) for store, t in stores.items() for rank in range(2)}
    begin_checkpoint(folder, 100, RUN, files, ()).complete()
    return folder, state


def optimizer_of(folder: Path) -> dict[str, Tensor]:
    store = open_checkpoint(folder, reads_all=True).optimizer
    assert store
    return contents(store)


@pytest.mark.parametrize("optimizer", KEYS)
@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(4, 3)], ids=str)
def test_there_and_back_is_the_same_bits(tmp_path: Path, optimizer: str, layout: Layout) -> None:
    """Two key/value heads over four ranks, and layers that do not divide evenly, included."""
    trained, state = saved(tmp_path / "trained", optimizer)
    reshard(open_checkpoint(trained), tmp_path / "whole", Layout())
    reshard(open_checkpoint(tmp_path / "whole"), tmp_path / "cut", layout)
    reshard(open_checkpoint(tmp_path / "cut"), tmp_path / "merged", Layout())
    for name in ("whole", "cut", "merged"):
        assert same(optimizer_of(tmp_path / name), state)
        assert same(contents(open_checkpoint(tmp_path / name).weights), WEIGHTS)
    merged = open_checkpoint(tmp_path / "merged").folder / "optimizer" / "optimizer-tp00-pp00.safetensors"
    assert same(load_file(merged), {state_name(name, to_hf): tensor for name, tensor in state.items()})


def test_each_file_holds_the_state_of_its_ranks_weights(tmp_path: Path) -> None:
    trained, state = saved(tmp_path / "trained", "adam")
    layout = Layout(4, 2)
    folder = reshard(open_checkpoint(trained), tmp_path / "cut", layout)
    found = {path.name for path in (folder / "optimizer").iterdir()}
    assert found == {f"optimizer-tp{t:02d}-pp{p:02d}.safetensors" for t in range(4) for p in range(2)}
    for tensor in range(layout.tensor):
        for stage in range(layout.pipeline):
            rank = f"tp{tensor:02d}-pp{stage:02d}"
            weights = load_file(folder / "model" / f"model-{rank}.safetensors")
            held = load_file(folder / "optimizer" / f"optimizer-{rank}.safetensors")
            assert held.keys() == {f"{key}.{name}" for key in KEYS["adam"] for name in weights}
            for name, whole in state.items():
                weight = name.partition(".")[2]
                if to_hf(weight) in weights:
                    assert stage_of(weight, 3, layout.pipeline) == stage
                    part = tensor_ranges(weight, tuple(whole.shape), CONFIG.model, layout.tensor, tensor)
                    assert torch.equal(held[state_name(name, to_hf)], whole[part])


def test_all_that_resuming_reads_is_kept(tmp_path: Path) -> None:
    trained, _ = saved(tmp_path / "trained", "adam")
    reshard(open_checkpoint(trained), tmp_path / "cut", Layout(2))
    run = open_checkpoint(tmp_path / "cut").run
    assert {key: run[key] for key in RUN if key != "config"} == {k: v for k, v in RUN.items() if k != "config"}


@pytest.mark.parametrize("rows", [50, 20, 5])
@pytest.mark.parametrize("layout", [Layout(), Layout(4, 2)], ids=str)
def test_a_vocabulary_that_grows_or_is_cut(tmp_path: Path, layout: Layout, rows: int) -> None:
    """New rows are zero, as training has them; five rows over four ranks included."""
    trained, state = saved(tmp_path / "trained", "adam")
    reshard(open_checkpoint(trained), tmp_path / "cut", layout, vocab_size=rows)
    expected = {
        name: torch.cat([old[:rows], torch.zeros(max(rows - VOCAB_SIZE, 0), old.shape[1])])
        if name.endswith(("embedding.weight", "lm_head.weight"))
        else old
        for name, old in state.items()
    }
    assert same(optimizer_of(tmp_path / "cut"), expected)


@pytest.mark.parametrize(("flags", "says"), [(["--no_optim"], False), (["--bf16"], True)])
def test_it_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: bool) -> None:
    trained, _ = saved(tmp_path / "trained", "adam")
    checkpoint_util(["--load_dir", str(trained), "--save_dir", str(tmp_path / "cut"), *flags])
    output = capsys.readouterr().out
    assert ("--bf16 leaves the optimizer state out" in output) == says
    assert f"{len(WEIGHTS)} tensors" in output
    cut = open_checkpoint(tmp_path / "cut")
    assert cut.optimizer is None
    assert not (cut.folder / "optimizer").exists()
    dtype = torch.bfloat16 if says else torch.float32
    assert same(contents(cut.weights), {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()})


def test_rounded_weights_keep_the_state_in_fp32(tmp_path: Path) -> None:
    """State is never rounded, whatever the weights are stored in."""
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in WEIGHTS.items()}
    trained, state = saved(tmp_path / "trained", "adam", rounded)
    reshard(open_checkpoint(trained), tmp_path / "cut", Layout(2))
    assert same(contents(open_checkpoint(tmp_path / "cut").weights), rounded)
    assert same(optimizer_of(tmp_path / "cut"), state)


def test_its_bytes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, _ = saved(tmp_path / "trained", "adam")
    checkpoint_util(["--load_dir", str(trained), "--save_dir", str(tmp_path / "cut")])
    parameters = sum(tensor.numel() for tensor in WEIGHTS.values())
    figures = f"{3 * len(WEIGHTS)} tensors, {parameters:,} parameters with optimizer state, "
    assert f"{figures}{3 * 4 * parameters / 1e6:,.1f} MB" in capsys.readouterr().out


def test_the_export_is_of_the_weights_alone(tmp_path: Path) -> None:
    trained, _ = saved(tmp_path / "trained", "adam")
    reshard(open_checkpoint(trained), tmp_path / "cut", Layout(2, 2))
    megatron_to_hf(["--input_dir", str(tmp_path / "cut"), "--output_dir", str(tmp_path / "hf")])
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    assert same(load_file(file), {to_hf(name): tensor for name, tensor in WEIGHTS.items()})


def test_damaged_state_is_found(tmp_path: Path) -> None:
    trained, _ = saved(tmp_path / "trained", "adam")
    folder = reshard(open_checkpoint(trained), tmp_path / "cut", Layout(2))
    (folder / "optimizer" / "optimizer-tp01-pp00.safetensors").unlink()
    with pytest.raises(ValueError, match=r"optimizer-tp01-pp00\.safetensors is missing"):
        open_checkpoint(tmp_path / "cut")
    left = {name: written for name, written in read_manifest(folder).items() if "optimizer-tp01" not in name}
    (folder / "manifest.json").write_bytes(manifest_bytes(left))
    with pytest.raises(ValueError, match="the files hold only a part of exp_avg"):
        open_checkpoint(folder)
