"""Uploads: what would go is listed, what does not load is refused, and a failure is one line. No network is used."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from tiny_llamas import edit_config, save_llama
from tiny_tokenizers import byte_level

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.reshard import Layout, reshard
from megatron.config import UsageError

ROOT = Path(__file__).resolve().parents[2]
NAME = "someone/tiny-model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model in two files of weights, and a file that is nobody's business."""
    save_llama(tmp_path / "hf", vocab_size=284).save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    (tmp_path / "hf" / "model.safetensors").unlink(missing_ok=True)
    byte_level(tmp_path / "hf")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "hf" / ".hidden").write_text("mine")
    return tmp_path / "hf"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a hub that does everything is asked."""
    made: list[tuple[str, dict[str, Any]]] = []

    class FakeHub:
        def __init__(self, **options: Any) -> None:
            made.append(("connect", options))

        def create_repo(self, name: str, **options: Any) -> None:
            made.append(("create_repo", {"name": name, **options}))

        def create_branch(self, name: str, **options: Any) -> None:
            made.append(("create_branch", {"name": name, **options}))

        def upload_folder(self, **options: Any) -> Any:
            made.append(("upload_folder", {**options, "there": sorted(os.listdir(options["folder_path"]))}))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return made


def push(folder: Path, *flags: str, name: str = NAME) -> None:
    main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / "push_to_hub.py"))["main"]
    main(["--input_dir", str(folder), "--hf_repo_name", name, *flags])


def test_a_damaged_checkpoint_is_not_uploaded(model: Path, calls: list[Any], tmp_path: Path) -> None:
    reshard(open_checkpoint(model), tmp_path / "ours", Layout())
    path = next((tmp_path / "ours").glob("release/model/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        push(tmp_path / "ours")
    assert calls == []


def test_a_dry_run_lists_and_connects_to_nobody(
    model: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    push(model, "--dry_run")
    *files, total, last = capsys.readouterr().out.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in map(str.split, files)}
    expected = {path.name: path.stat().st_size for path in model.iterdir() if path.name != ".hidden"}
    assert listed == expected
    assert total.split() == [f"{sum(expected.values()):,}", "bytes", "in", str(len(expected)), "files"]
    assert last == f"dry run: nothing was uploaded to {NAME}"
    assert calls == []


def test_an_upload(model: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    push(model, "--auth_token", "secret", "--branch", "trial", "--private")
    names = sorted(path.name for path in model.iterdir() if path.name != ".hidden")
    uploaded = {"repo_id": NAME, "folder_path": model, "allow_patterns": names, "revision": "trial"}
    assert calls == [
        ("connect", {"token": "secret"}),
        ("create_repo", {"name": NAME, "private": True, "exist_ok": True}),
        ("create_branch", {"name": NAME, "branch": "trial", "exist_ok": True}),
        ("upload_folder", {**uploaded, "there": sorted(os.listdir(model))}),
    ]
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "uploaded: https://hub/commit/1"
    assert "secret" not in output


def test_a_checkpoint_is_exported_first(model: Path, tmp_path: Path, calls: list[Any]) -> None:
    reshard(open_checkpoint(model), tmp_path / "weights", Layout(2, 1))
    before = sorted(path.name for path in tmp_path.iterdir())
    push(tmp_path / "weights")
    _, upload = calls[-1]
    assert upload["revision"] is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(upload["there"])
    assert not upload["folder_path"].exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def lose_weights(folder: Path) -> None:
    next(folder.glob("*-00002-of-*")).unlink()


def cut_weights(folder: Path) -> None:
    file = next(folder.glob("*-00001-of-*"))
    file.write_bytes(file.read_bytes()[:-100])


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def enlarge_tokenizer(folder: Path) -> None:
    """280 tokens, 9 more, and the end of text."""
    byte_level(folder, [f"<{i}>" for i in range(9)])


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def contradict(folder: Path) -> None:
    edit_config(folder, hidden_size=64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_weights, "names model-00002-of-"),
        (cut_weights, "model-00001-of-"),
        (lose_tokenizer, "has no tokenizer: none of tokenizer.json"),
        (break_tokenizer, "transformers cannot load the tokenizer"),
        (enlarge_tokenizer, "the tokenizer has 290 tokens, the model only 284 rows"),
        (lose_config, "is no checkpoint: it has neither"),
        (contradict, "but by config.json it should be"),
    ],
    ids=lambda value: getattr(value, "__name__", "message"),
)
def test_what_does_not_load_is_refused(
    model: Path, calls: list[Any], damage: Callable[[Path], None], message: str
) -> None:
    damage(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        push(model)
    assert calls == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "someone/", "some one/tiny"])
def test_a_name_that_is_none(model: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not USER/NAME"):
        push(model, name=name)


def test_without_a_network_it_fails_in_one_line(model: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "push_to_hub.py"), "--input_dir", str(model)),
            *("--hf_repo_name", NAME, "--auth_token", "hf_secret"),
        ],
        env=os.environ
        | {
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"push_to_hub.py: failed: {NAME} was not uploaded: ")
    assert "hf_secret" not in result.stdout + result.stderr
