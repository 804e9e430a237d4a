"""Fixtures of tests of data."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short files have several chunks."""
    monkeypatch.setattr("megatron.data.preprocess.SMALLEST_CHUNK", 1)


@pytest.fixture(scope="session")
def megatron_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NVIDIA's package, whose name is ours too."""
    folder = tmp_path_factory.mktemp("megatron_core")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    try:
        done = subprocess.run(
            [*command, "--timeout=20", "--target", str(folder), "megatron-core==0.16.0"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("pip took too long to fetch megatron-core==0.16.0")
    if done.returncode:
        pytest.skip(f"pip cannot fetch megatron-core==0.16.0: {done.stderr.strip()[-200:]}")
    return folder
