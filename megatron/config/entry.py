"""How an entry script ends: exit codes and the last line on standard error."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.config.errors import UsageError

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def run_entry(main: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Mistakes of users and faults of their files are one line on standard error; any other error is a bug and keeps its
    traceback.
    """
    program = Path(main.__code__.co_filename).name
    try:
        main(list(argv))
    except UsageError as error:
        return _end(f"{program}: error: {error}" if _is_first_rank() else "", WRONG_USAGE)
    except (ValueError, OSError) as error:
        return _end(f"{program}: failed: {error}", FAILED)
    except KeyboardInterrupt:
        return _end(f"{program}: interrupted", INTERRUPTED)
    return DONE


def _end(message: str, code: int) -> int:
    if message:
        print(message, file=sys.stderr, flush=True)
    return code


def _is_first_rank() -> bool:
    """A wrong flag is wrong on every rank of a machine (a path may be wrong on one machine only); one rank says so."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
