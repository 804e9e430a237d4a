"""Running a script as a user does, and seeing that it does without torch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WATCHED = """
import runpy, sys
sys.argv[0:1] = []
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


def run_watched(script: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script at a path below the repository; `before` is code that comes first."""
    return subprocess.run(
        [sys.executable, "-c", before + WATCHED, str(ROOT / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
