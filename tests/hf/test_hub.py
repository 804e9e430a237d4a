"""What is taken from the hub, told by a hub that lies in a folder."""

import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from megatron.hf.hub import model_folder

SETTINGS = {"config.json", "tokenizer.model"}
SAFE = {"model.safetensors"}
PICKLED = {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        (SETTINGS | SAFE | PICKLED | {"README.md"}, SETTINGS | SAFE),
        (SETTINGS | SAFE, SETTINGS | SAFE),
        (SETTINGS | PICKLED, SETTINGS | PICKLED),
    ],
)
def test_weights_come_in_one_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offered: set[str], taken: set[str]
) -> None:
    def download(name: str, *, cache_dir: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, cache_dir) == ("someone/model", str(tmp_path))
        for file in offered:
            allowed, ignored = (
                any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            if allowed and not ignored:
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("someone/model", str(tmp_path)) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == taken


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path), None) == tmp_path
