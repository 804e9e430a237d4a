"""How an entry script ends: exit codes and the last line on standard error."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.config.errors import UsageError

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
FIRST_RANK_SECONDS = 10.0
"""More than ranks that start together are apart."""


def run_entry(main: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Mistakes of users and faults of their files are one line on standard error; any other error is a bug and keeps its
    traceback.
    """
    program = Path(main.__code__.co_filename).name
    try:
        main(list(argv))
    except UsageError as error:
        _let_the_first_rank_speak()
        return _end(f"{program}: error: {error}", WRONG_USAGE)
    except (ValueError, OSError) as error:
        return _end(f"{program}: failed: {error}", FAILED)
    except KeyboardInterrupt:
        return _end(f"{program}: interrupted", INTERRUPTED)
    return DONE


def _end(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def _let_the_first_rank_speak() -> None:
    """A wrong flag is wrong on every rank of a machine; the first one says so, and torchrun ends the others meanwhile.

    Whoever ended before it would take the message with it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_RANK_SECONDS)
