"""Work in processes: results in order, whatever goes wrong, and however large the tasks are."""

import signal
from collections.abc import Iterator

import pytest

from megatron.data.processes import map_in_order


@pytest.fixture
def impatience() -> Iterator[None]:
    """End what hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError("the processes wait for each other")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def test_results_come_in_order() -> None:
    assert list(map_in_order(lambda item: item * item, range(100), workers=3)) == [i * i for i in range(100)]


def test_errors_of_a_worker_come_in_order() -> None:
    def fail_at_three(item: int) -> int:
        if item >= 3:
            raise LookupError(item)
        return item * item

    seen = []
    with pytest.raises(LookupError, match="3"):
        seen.extend(map_in_order(fail_at_three, range(50), workers=3))
    assert list(map_in_order(fail_at_three, [], workers=2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_large_tasks_and_results_do_not_wait_for_each_other(workers: int, impatience: None) -> None:
    tasks = [bytes([i]) * 5_000_000 for i in range(6)]
    assert list(map_in_order(lambda task: task, tasks, workers)) == tasks


@pytest.mark.parametrize(("error", "told"), [(LookupError("bug"), True), (ValueError("bad line"), False)])
def test_only_bugs_have_the_trace_of_the_worker(error: Exception, told: bool) -> None:
    def fail(_: int) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)) as raised:
        list(map_in_order(fail, range(1), workers=1))
    assert ("in fail" in "".join(getattr(raised.value, "__notes__", []))) == told
