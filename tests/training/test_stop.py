import signal

from megatron.config import TrainingConfig
from megatron.training.stop import StopAfterDuration, StopAtInterval, StopOnSignal, agreed_reason, build_stops


def alone(flag):
    return flag


def test_interval():
    stop = StopAtInterval(10)
    assert [n for n in range(1, 31) if stop.reason(n)] == [10, 20, 30]
    assert "--exit_interval 10" in stop.reason(20)


def test_duration():
    now = [0.0]
    stop = StopAfterDuration(2, clock=lambda: now[0])
    now[0] = 119.0
    assert stop.reason(1) is None
    now[0] = 120.0
    assert stop.reason(1) == "2.0 minutes have passed, --exit_duration_in_mins is 2"


def test_signal_is_noted_and_the_handler_given_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopOnSignal([signal.SIGUSR1]) as stop:
        assert stop.reason(1) is None
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason(1) == "SIGUSR1 was received"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_flags_decide_what_is_watched():
    assert build_stops(TrainingConfig(), None) == []
    signals = StopOnSignal()
    stops = build_stops(TrainingConfig(exit_interval=5, exit_duration_in_mins=1), signals)
    assert [type(stop) for stop in stops] == [StopOnSignal, StopAfterDuration, StopAtInterval]


def test_one_rank_stops_all():
    stops = [StopAtInterval(10)]
    assert agreed_reason(stops, 10, alone) == "iteration 10 is a multiple of --exit_interval 10"
    assert agreed_reason(stops, 9, alone) is None
    assert agreed_reason(stops, 9, lambda flag: True) == "another rank asked to stop"


def test_without_stops_the_other_ranks_are_not_asked():
    def unexpected(flag):
        raise AssertionError("asked")

    assert agreed_reason([], 1, unexpected) is None
