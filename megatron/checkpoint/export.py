"""Export to Hugging Face: a folder that `transformers` loads, and the proof that it computes the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megatron.checkpoint.formed import formed, formed_shape
from megatron.checkpoint.load import HF_CONFIG, Checkpoint
from megatron.checkpoint.safetensors_file import Entry, SafetensorsWriter
from megatron.config import UsageError
from megatron.hf.config import EXPORTED, hf_config
from megatron.hf.forms import targets
from megatron.hf.tokenizer import export_tokenizer, is_own, stop_ids, token_ids
from megatron.model import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-3
"""Largest difference of logits, computed in fp32 on both sides, that is rounding."""


def export(
    checkpoint: Checkpoint,
    output: Path,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write a Hugging Face folder beside `output` and return it; `publish` gives it its name.

    Args:
        checkpoint: of any layout.
        output: the folder to come.
        dtype: of the weights; by default that of the training run, else as stored.
        shards: number of weight files; by default one for each 5 GB.
        progress: is told the bytes written.

    Raises:
        UsageError: `output` is not to be replaced: it holds `checkpoint`, or something else than an earlier export; or
            `shards` is not positive.
        ValueError: the tokenizer has no equal in `transformers`.
    """
    if shards is not None and shards < 1:
        raise UsageError(f"--num_output_shards {shards} is not positive")
    output = output.resolve()
    _check_replaceable(output, checkpoint.folder.resolve())
    folder = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        kind = dtype or _trained_dtype(checkpoint)
        tokens = _write_tokenizer(checkpoint, folder)
        _write_json(folder / HF_CONFIG, hf_config(checkpoint.model, checkpoint.vocab_size, kind, tokens))
        _write_weights(checkpoint, folder, kind, shards, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def publish(folder: Path, output: Path) -> None:
    """Give an exported folder its name; an earlier export of that name goes when the new one has it."""
    output = output.resolve()
    replaced = output.with_name(f".{output.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    folder.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_replaceable(output: Path, source: Path) -> None:
    """An export replaces an earlier one, never the user's other files."""
    if source.is_relative_to(output):
        raise UsageError(f"--output_dir {output} holds the checkpoint that is read; give another folder")
    if output.exists() and not (output.is_dir() and ((output / HF_CONFIG).is_file() or not any(output.iterdir()))):
        raise UsageError(f"--output_dir {output} exists and is no earlier export; give another folder or remove it")


def logits_difference(checkpoint: Checkpoint, folder: Path, tokens: int = 32) -> float:
    """Largest difference of logits between the checkpoint here and the exported `folder` in `transformers`.

    Both compute in fp32, on random tokens, with the weights as exported.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    stored = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    ours = Model(checkpoint.model, checkpoint.vocab_size).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(checkpoint.weights.read(name).to(stored))
        ids = torch.randint(checkpoint.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
        mine = ours(ids, torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), tokens)
        return float((mine - theirs(ids[None]).logits[0]).abs().max())


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> dict[str, int | None]:
    """Write tokenizer and generation settings; returns the token ids that config.json names."""
    source = checkpoint.tokenizer_folder
    tokens: dict[str, int | None] = checkpoint.run.get("tokens", {})
    stops: object = tokens.get("eos_token_id")
    if source and is_own(source):
        export_tokenizer(source, folder)
        tokens, stops = token_ids(source), stop_ids(source)
    else:
        for file in checkpoint.tokenizer_files:
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / "generation_config.json", {**tokens, "eos_token_id": stops, "do_sample": False})
    return tokens


def _trained_dtype(checkpoint: Checkpoint) -> torch.dtype:
    precision = checkpoint.run["config"].get("precision", {})
    if precision.get("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.get("fp16") else checkpoint.weights.dtype("embedding.weight")


def _write_weights(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, shards: int | None, progress: Callable[[int], object]
) -> None:
    weights, model = checkpoint.weights, checkpoint.model
    parts = targets(EXPORTED[model.model_name], model, _in_order(weights.names()))
    shapes = {name: weights.shape(name) for name in weights.names()}
    entries = {name: Entry(name, dtype, formed_shape(shapes, made_of)) for name, made_of in parts.items()}
    total = sum(entry.size for entry in entries.values())
    files = _divide(entries, total, shards or -(-total // SHARD_BYTES))
    count, index = len(files), {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        with SafetensorsWriter(folder / file, [entries[name] for name in names], {"format": "pt"}) as writer:
            for name in names:
                writer.write(formed(weights, parts[name]).to(dtype))
                index[name] = file
                progress(entries[name].size)
    if count > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _in_order(names: list[str]) -> list[str]:
    """Embedding, layers by number, the rest."""

    def place(name: str) -> tuple[int, int]:
        if name.startswith("layers."):
            return 1, int(name.split(".")[1])
        return (0, 0) if name.startswith("embedding.") else (2, 0)

    return sorted(names, key=place)


def _divide(entries: dict[str, Entry], total: int, count: int) -> list[list[str]]:
    """Names in files of about equal size, in order."""
    files: list[list[str]] = [[] for _ in range(count)]
    written = 0
    for name, entry in entries.items():
        files[min(written * count // max(total, 1), count - 1)].append(name)
        written += entry.size
    return [names for names in files if names]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
