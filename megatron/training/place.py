"""Where a rank is in a run, so that whatever fails or hangs there says so."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.config import CommonError, PeerError, UsageError
from megatron.parallel.processes import lost_peers

CHECKS = 10
"""How often a wait is looked at before it is told."""


class Place:
    """The iteration and the part of it that a rank works on.

    Attributes:
        who: this process, in words.
        iteration: that is under way, or the last one; 0 before the first.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.who = f"rank {rank} of {size}"
        self.iteration = 0
        self._part = "starting"
        self._entered = time.monotonic()

    def __str__(self) -> str:
        iteration = f"in iteration {self.iteration}" if self.iteration else "before the first iteration"
        return f"{self.who}, {iteration}, {self._part}"

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Be in `part` for the time of the body; after an error it stays the place where that came up."""
        outer = self._part
        self._enter(part)
        yield
        self._enter(outer)

    def _enter(self, part: str) -> None:
        self._part, self._entered = part, time.monotonic()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the body say where they came up; those that other ranks caused become a `PeerError`."""
        try:
            yield
        except (UsageError, CommonError):
            raise
        except Exception as error:
            if why := lost_peers(error):
                lost = PeerError(f"lost the other ranks: {why}")
                lost.add_note(str(self))
                raise lost from error
            error.add_note(str(self))
            raise

    @contextmanager
    def watched(self, seconds: float, write: Callable[[str], object]) -> Iterator[None]:
        """Write a line, once, when this rank has been in one part for so many seconds.

        Where ranks wait for each other all of them do, and the one whose line names another part holds them up.
        """
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(seconds, write, ended), name="place", daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()

    def _watch(self, seconds: float, write: Callable[[str], object], ended: threading.Event) -> None:
        told = None
        while not ended.wait(seconds / CHECKS):
            entered = self._entered
            if entered != told and time.monotonic() - entered >= seconds:
                told = entered
                write(f"still at the same place after {seconds:.0f} s: {self}, {_main_thread_line()}\n")


def _main_thread_line() -> str:
    """The line of code that the main thread executes."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    last = traceback.extract_stack(frame)[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"
