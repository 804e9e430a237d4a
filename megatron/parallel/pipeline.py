"""Runs the pipeline's schedule: this stage's passes, slot by slot, and what it exchanges with other stages in between.

A slot is a moment at which passes end. Then each stage posts one exchange: the result it made, and room for the results
made for it in the same slot. All stages know all slots, so every send meets its receive in the exchange of the same
slot: messages cannot overtake or wait for each other in a circle, whatever the number of micro batches and however long
their rows.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.schedule import Action, Pipeline, Slot, slots


class Passes(Protocol):
    """What a stage computes."""

    def compute(self, action: Action, received: Tensor | None) -> Tensor | None:
        """Make the pass `action` with what was received for it; the result is for its consumer, if it has one."""
        ...

    def room(self, action: Action) -> Tensor:
        """An empty tensor for what `action` will receive."""
        ...


def run_pipeline(pipeline: Pipeline, passes: Passes, micro_batches: int, mail: "Mail", *, with_backward: bool) -> None:
    """Make all passes of this stage."""
    for slot in slots(pipeline, micro_batches, with_backward):
        action = slot[mail.stage]
        result = None
        if action:
            needs_message = any(pipeline.stage(needed) != mail.stage for needed in pipeline.needs(action))
            result = passes.compute(action, mail.take(action) if needs_message else None)
        target = pipeline.consumer(action) if action else None
        mail.exchange(result, target and pipeline.stage(target), _incoming(pipeline, slot, mail.stage, passes))
    mail.finish()


def _incoming(pipeline: Pipeline, slot: Slot, stage: int, passes: Passes) -> Mapping[Action, tuple[int, Tensor]]:
    """What the other stages make for this one in `slot`: the action it is for -> (whose result, room for it)."""
    consumers = {action: pipeline.consumer(action) for action in slot if action}
    return {
        target: (pipeline.stage(action), passes.room(target))
        for action, target in consumers.items()
        if target and pipeline.stage(target) == stage
    }


class Mail:
    """Messages between the stages of a pipeline.

    Args:
        group: the stages, in order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.stage = dist.get_rank(group)
        self._group = group
        self._arriving: dict[Action, tuple[Tensor, _Exchange]] = {}
        self._posted: deque[_Exchange] = deque()

    def exchange(self, result: Tensor | None, to: int | None, incoming: Mapping[Action, tuple[int, Tensor]]) -> None:
        """Send `result` to stage `to`, if there is one, and begin to receive what is `incoming`."""
        sends = []
        if result is not None and to is not None:
            result = result.contiguous()
            sends = [self._operation(dist.isend, result, to)]
        receives = [self._operation(dist.irecv, room, stage) for stage, room in incoming.values()]
        if not sends and not receives:
            return
        if len(self._posted) > 1:  # it has had a slot's time; what it sent may go
            self._posted.popleft().wait()
        exchange = _Exchange([*sends, *receives])
        self._posted.append(exchange)
        self._arriving |= {action: (room, exchange) for action, (_, room) in incoming.items()}

    def take(self, action: Action) -> Tensor:
        """What `action` receives; waits for it."""
        tensor, exchange = self._arriving.pop(action)
        exchange.wait()
        return tensor

    def finish(self) -> None:
        """Wait until everything is sent."""
        while self._posted:
            self._posted.popleft().wait()

    def swap(self, tensor: Tensor, stage: int) -> Tensor:
        """Give `tensor` to another stage and get the one of the same shape that it gives."""
        received = torch.empty_like(tensor)
        _Exchange([self._operation(dist.isend, tensor, stage), self._operation(dist.irecv, received, stage)]).wait()
        return received

    def _operation(self, kind: Callable[..., object], tensor: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=stage)


class _Exchange:
    """Messages under way; keeps their tensors until they are waited for."""

    def __init__(self, operations: list[dist.P2POp]) -> None:
        self._operations = operations
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> None:
        """Wait for all of them, once: a second wait on a work of gloo would not end."""
        while self._works:
            self._works.pop().wait()
        self._operations = []
