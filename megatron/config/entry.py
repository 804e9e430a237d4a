"""How an entry script ends: exit codes, the last line on standard error, and what the launcher is told."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megatron.config.errors import CommonError, PeerError, UsageError

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
OTHERS_FIRST_SECONDS = 10.0
"""More than ranks that fail together are apart."""


def run_entry(main: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Mistakes of users, faults of their files and ranks that were lost are one line on standard error; any other error is
    a bug and keeps its traceback. Under torchrun a process that fails ends here.
    """
    program = Path(main.__code__.co_filename).name
    try:
        main(list(argv))
    except UsageError as error:
        return _fail(f"{program}: error: {error}", WRONG_USAGE, error)
    except (ValueError, OSError, PeerError) as error:
        notes = [f" ({note})" for note in getattr(error, "__notes__", ())]
        return _fail(f"{program}: failed: {error}{''.join(notes)}", FAILED, error)
    except KeyboardInterrupt as error:
        return _fail(f"{program}: interrupted", INTERRUPTED, error)
    except Exception as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        return _fail(traceback.format_exc().rstrip(), FAILED, error)
    return DONE


def interrupt_on_sigterm() -> None:
    """Take what a job scheduler sends as an interrupt, too: an exception, which leaves no half-written files."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _fail(message: str, code: int, error: BaseException) -> int:
    """Say why; among the processes of torchrun in the right order, and for its summary, too."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        print(message, file=sys.stderr, flush=True)
        return code
    if _speaks_later(error):
        time.sleep(OTHERS_FIRST_SECONDS)
    _tell_launcher(message)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # what else still runs in this process may wait for other ranks, and they for its end


def _speaks_later(error: BaseException) -> bool:
    """Whether others know better; torchrun ends this process as soon as the first one has ended.

    What all ranks find is told by the first one of a machine, and the end of a rank by that rank.
    """
    is_common = isinstance(error, UsageError | CommonError)
    return isinstance(error, PeerError) or (is_common and os.environ.get("LOCAL_RANK", "0") != "0")


def _tell_launcher(message: str) -> None:
    """Write the file from which torchrun takes what it calls the traceback of the root cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # a full disk may be what the message is about
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
