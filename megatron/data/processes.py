"""A function over many items, in worker processes, results in order."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS_EACH = 2
"""Tasks a worker has at a time: one at work, one waiting."""
AHEAD_EACH = 8
"""Tasks a worker, at most, whose results wait for an earlier one."""


def usable_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`function(item)` of each item, in the order of `items`, computed by `workers` processes.

    Items and results travel through a pipe. Close the generator (`contextlib.closing`) to end the processes
    early. Interrupts are the caller's business: workers ignore them.

    Raises:
        ChildProcessError: a worker died.
        Exception: whatever `function` raised for the first item at which it did.
    """
    forking = "fork" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if forking else "spawn")
    workforce: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [*workforce, ours] if forking else []
            process = context.Process(target=_serve, args=(function, theirs, inherited), daemon=True)
            process.start()
            theirs.close()
            workforce[ours] = process
        yield from _dispatch(workforce, iter(items))
    finally:
        for connection, process in workforce.items():
            connection.close()
            process.terminate()
            process.join()


def _dispatch(workforce: dict[Connection, BaseProcess], items: Iterator[Any]) -> Iterator[Any]:
    free = deque([*workforce] * TASKS_EACH)
    results: dict[int, Any] = {}
    sent = done = 0
    exhausted = False
    while not (exhausted and done == sent):
        while free and not exhausted and sent - done < AHEAD_EACH * len(workforce):
            try:
                task = (sent, next(items))
            except StopIteration:
                exhausted = True
                break
            connection = free.popleft()
            with _alive(workforce[connection]):
                connection.send(task)
            sent += 1
        if done not in results and done < sent:
            for connection in _readable(workforce):
                with _alive(workforce[connection]):
                    index, result = connection.recv()
                results[index] = result
                free.append(connection)
        while done in results:
            result = results.pop(done)
            if isinstance(result, Exception):
                raise result
            yield result
            done += 1


def _readable(workforce: dict[Connection, BaseProcess]) -> list[Connection]:
    ready = wait([*workforce])
    return [connection for connection in workforce if connection in ready]


@contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """Turn a broken pipe into an error that says that the worker died."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(1)
        raise ChildProcessError(
            f"a worker process ended unexpectedly (exit code {process.exitcode}; -9 is often a lack of memory)"
        ) from error


def _serve(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]) -> None:
    """Work off what comes through `connection` until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores: threads would only compete
    # A copy of the parent's end here would keep a worker waiting for a parent that is gone.
    for copy in inherited:
        copy.close()
    tasks: SimpleQueue[Any] = SimpleQueue()
    # Were nobody to receive during the work, a large task and a large result could wait for each other.
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        index, item = task
        try:
            result: Any = function(item)
        except Exception as error:
            if not isinstance(error, ValueError | OSError):  # those are for the user, who needs no traceback
                error.add_note(traceback.format_exc())
            result = error
        try:
            connection.send((index, result))
        except OSError:
            return


def _receive(connection: Connection, tasks: SimpleQueue[Any]) -> None:
    """Put the tasks that come into the queue, and None when no more can."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        tasks.put(None)
