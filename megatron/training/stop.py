"""Why a run stops before its last iteration. It saves first, so that the next start goes on from there."""

import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol

from megatron.config import TrainingConfig


class Stop(Protocol):
    """One reason to stop."""

    def reason(self, iteration: int) -> str | None:
        """Why to stop after `iteration`, in words for the log; None to go on."""
        ...


class StopAtInterval:
    """`--exit_interval`: stop after every multiple of so many iterations."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def reason(self, iteration: int) -> str | None:
        """Whether `iteration` is a multiple."""
        is_due = iteration % self._interval == 0
        return f"iteration {iteration} is a multiple of --exit_interval {self._interval}" if is_due else None


class StopAfterDuration:
    """`--exit_duration_in_mins`: stop when this many minutes have passed since this object was made."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes = minutes
        self._clock = clock
        self._start = clock()

    def reason(self, iteration: int) -> str | None:
        """Whether time is up on this rank."""
        minutes = (self._clock() - self._start) / 60.0
        if minutes < self._minutes:
            return None
        return f"{minutes:.1f} minutes have passed, --exit_duration_in_mins is {self._minutes:g}"


class StopOnSignal:
    """`--exit_signal_handler`: stop after the step during which a signal came.

    A context manager: it takes the signals over on entry and gives them back on exit.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
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

    def reason(self, iteration: int) -> str | None:
        """Whether a signal came to this rank."""
        return f"{self._received.name} was received" if self._received else None


def build_stops(training: TrainingConfig, on_signal: StopOnSignal | None) -> list[Stop]:
    """What the flags ask for; `on_signal` is the entered `StopOnSignal` where `--exit_signal_handler` is given."""
    stops: list[Stop] = []
    if on_signal:
        stops.append(on_signal)
    if training.exit_duration_in_mins:
        stops.append(StopAfterDuration(training.exit_duration_in_mins))
    if training.exit_interval:
        stops.append(StopAtInterval(training.exit_interval))
    return stops


def agreed_reason(stops: Sequence[Stop], iteration: int, any_rank: Callable[[bool], bool]) -> str | None:
    """The first reason to stop, the same decision on every rank.

    Clocks and signals differ between ranks, so `any_rank` (true on all if true on one) is asked once an iteration,
    unless there is nothing to ask about.
    """
    if not stops:
        return None
    reason = next((why for stop in stops if (why := stop.reason(iteration))), None)
    if not any_rank(reason is not None):
        return None
    return reason or "another rank asked to stop"
