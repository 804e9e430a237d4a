"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import World, WorldPools

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, tokenizers, models and golden files; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MEGATRON_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared test data: set MEGATRON_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """`world(size, function, *args)`: run a function on real ranks, and get what each returned."""
    pools = WorldPools()
    yield pools.run
    pools.close()
