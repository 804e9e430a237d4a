"""Why a run stops before its last iteration. It saves first, so that the next start goes on from there."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol

from megatron.config import TrainingConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What `--exit_signal_handler` takes over: schedulers send the first and the last, keyboards the second."""
SLOW_DISK = 2e8
"""Bytes a second that a rank may have to write a checkpoint with."""


class Stop(Protocol):
    """One reason to stop."""

    def reason(self, iteration: int | None) -> str | None:
        """Why to stop after `iteration`, in words for the log; None to go on.

        Without an iteration: why to stop at once, before the first one or within an evaluation.
        """
        ...


class StopAtInterval:
    """`--exit_interval`: stop after every multiple of so many iterations."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def reason(self, iteration: int | None) -> str | None:
        """Whether `iteration` is a multiple."""
        is_due = iteration is not None and iteration % self._interval == 0
        return f"iteration {iteration} is a multiple of --exit_interval {self._interval}" if is_due else None


@dataclass
class Pace:
    """How many seconds things took on this rank last; what comes is expected to take as long.

    Attributes:
        iteration: one of them.
        save: a checkpoint.
        saves: checkpoints that are written if the run stops now; two while one is written in the background.
    """

    iteration: float = 0.0
    save: float = 0.0
    saves: int = 1


def guessed_save_seconds(weight_bytes: int) -> float:
    """What the first checkpoint may take: a rank's weights and Adam's two averages, to a slow disk."""
    return 3 * weight_bytes / SLOW_DISK


class StopAfterDuration:
    """`--exit_duration_in_mins`: stop while an iteration and a checkpoint still fit in.

    Args:
        minutes: after `start`.
        pace: of this rank.
        start: on `clock`.
        clock: seconds.
    """

    def __init__(self, minutes: float, pace: Pace, start: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes = minutes
        self._pace = pace
        self._start = start
        self._clock = clock

    def reason(self, iteration: int | None) -> str | None:
        """Whether time is up on this rank."""
        seconds, saving = self._clock() - self._start, self._pace.saves * self._pace.save
        if seconds + self._pace.iteration + saving < self._minutes * 60.0:
            return None
        return (
            f"{seconds / 60.0:.1f} minutes have passed, an iteration takes {self._pace.iteration:.1f} s and saving "
            f"{saving:.1f} s: --exit_duration_in_mins is {self._minutes:g}"
        )


class StopOnSignal:
    """`--exit_signal_handler`: stop after the step during which a signal came.

    A context manager: it takes the signals over on entry and gives them back on exit. Whoever interrupts a second time
    does not want to wait: after a SIGINT the next one, or a SIGTERM, ends the process at once.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = signals
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if number == signal.SIGINT:
            for impatient in (signal.SIGINT, signal.SIGTERM):
                signal.signal(impatient, signal.SIG_DFL)

    def reason(self, iteration: int | None) -> str | None:
        """Whether a signal came to this rank."""
        return f"{self._received.name} was received" if self._received else None


@dataclass(frozen=True)
class Stops:
    """All reasons to stop; every rank decides alike.

    Attributes:
        stops: the first one that has a reason gives it.
        any_rank: true on all ranks if true on one. Clocks and signals differ between ranks, so it is asked each time,
            unless there is nothing to ask about.
        pace: what running out of time is judged by; whoever trains and saves keeps it up to date.
    """

    stops: Sequence[Stop] = ()
    any_rank: Callable[[bool], bool] = bool
    pace: Pace = field(default_factory=Pace)

    def reason(self, iteration: int | None = None) -> str | None:
        """As a `Stop`'s."""
        if not self.stops:
            return None
        reason = next((why for stop in self.stops if (why := stop.reason(iteration))), None)
        if not self.any_rank(reason is not None):
            return None
        return reason or "another rank asked to stop"


@contextmanager
def open_stops(training: TrainingConfig, start: float, any_rank: Callable[[bool], bool]) -> Iterator[Stops]:
    """What the flags ask for; signals are taken over meanwhile.

    Args:
        training: the flags.
        start: of the run, on `time.monotonic`'s clock.
        any_rank: see `Stops`.
    """
    pace, stops = Pace(), list[Stop]()
    with ExitStack() as stack:
        if training.exit_signal_handler:
            stops.append(stack.enter_context(StopOnSignal()))
        if training.exit_duration_in_mins:
            stops.append(StopAfterDuration(training.exit_duration_in_mins, pace, start))
        if training.exit_interval:
            stops.append(StopAtInterval(training.exit_interval))
        yield Stops(stops, any_rank, pace)
