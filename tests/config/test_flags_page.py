"""docs/flags.md is what the tables say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_flags_is_current() -> None:
    command = [sys.executable, str(ROOT / "tools" / "document_flags.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""
