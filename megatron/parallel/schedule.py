"""The pipeline's schedule: which pass a stage computes in which slot of time. Pure arithmetic, the same on every rank.

A stage is a rank's place in the pipeline. It holds one chunk of the layers, or, interleaved, several: the model is cut
into stages x chunks virtual stages, and stage s holds those with v % stages == s, so that a micro batch goes round the
stages once for each chunk.

4 stages, 1 chunk, 6 micro batches; F2 is the forward pass of micro batch 2, B2 its backward pass:

    stage 0   F0 F1 F2 F3          B0 F4 B1 F5 B2    B3    B4    B5
    stage 1      F0 F1 F2       B0 F3 B1 F4 B2 F5 B3    B4    B5
    stage 2         F0 F1    B0 F2 B1 F3 B2 F4 B3 F5 B4    B5
    stage 3            F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5

1F1B: Narayanan et al. 2019, PipeDream (as PipeDream-Flush, 2021, arXiv:2006.09503); interleaved: Narayanan et al. 2021,
arXiv:2104.04473.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple


class Action(NamedTuple):
    """A pass of one micro batch through one virtual stage."""

    is_forward: bool
    virtual_stage: int
    micro_batch: int


Slot = Sequence[Action | None]
"""What each stage has done at the same moment; None: nothing."""
BACKWARD_COST = 2
"""Forward passes that a backward pass takes as long as, to order the slots; 3 with full recomputation."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of `stages` ranks that hold `chunks` chunks each."""

    stages: int
    chunks: int = 1

    @property
    def last(self) -> int:
        """The virtual stage with the loss."""
        return self.stages * self.chunks - 1

    def stage(self, action: Action) -> int:
        """Whose action it is."""
        return action.virtual_stage % self.stages

    def chunk(self, action: Action) -> int:
        """Through which of the stage's chunks it goes."""
        return action.virtual_stage // self.stages

    def consumer(self, action: Action) -> Action | None:
        """The action that takes the result: activations go one virtual stage on, gradients one back."""
        following = action.virtual_stage + (1 if action.is_forward else -1)
        return action._replace(virtual_stage=following) if 0 <= following <= self.last else None

    def needs(self, action: Action) -> list[Action]:
        """What must have been computed before."""
        previous = action.virtual_stage - (1 if action.is_forward else -1)
        needed = [action._replace(virtual_stage=previous)] if 0 <= previous <= self.last else []
        return needed if action.is_forward else [*needed, action._replace(is_forward=True)]

    def order(self, stage: int, micro_batches: int, with_backward: bool = True) -> list[Action]:
        """The actions of a stage: forward passes to fill the pipeline, then one backward and one forward in turn.

        Interleaved, micro batches go in groups of at least `stages`: the first chunk for all of a group, then the
        second for all of it. Smaller groups would wait for themselves.
        """
        groups = _groups(micro_batches, self.stages) if self.chunks > 1 else [range(micro_batches)]
        virtual_stages = range(stage, self.last + 1, self.stages)
        forward = [Action(True, v, m) for group in groups for v in virtual_stages for m in group]
        if not with_backward:
            return forward
        backward = [Action(False, v, m) for group in groups for v in reversed(virtual_stages) for m in group]
        filling = self.stages - 1 - stage
        if self.chunks > 1:
            filling = 2 * filling + (self.chunks - 1) * max(map(len, groups), default=0)
        filling = min(filling, len(forward))
        pairs = zip(forward[filling:], backward, strict=False)
        return [*forward[:filling], *(action for pair in pairs for action in pair), *backward[len(forward) - filling :]]

    def starts(self, micro_batches: int, with_backward: bool = True, backward_cost: int = 1) -> dict[Action, int]:
        """When each action starts, if every one starts as soon as it can and a forward pass takes 1."""
        waiting = [self.order(stage, micro_batches, with_backward)[::-1] for stage in range(self.stages)]
        free, starts, ends = [0] * self.stages, dict[Action, int](), dict[Action, int]()
        while any(waiting):
            ready = [
                s for s, actions in enumerate(waiting) if actions and all(n in ends for n in self.needs(actions[-1]))
            ]
            assert ready, f"{self} waits for itself with {micro_batches} micro batches"
            for stage in ready:
                action = waiting[stage].pop()
                starts[action] = max([free[stage], *(ends[needed] for needed in self.needs(action))])
                free[stage] = ends[action] = starts[action] + (1 if action.is_forward else backward_cost)
        return starts


@lru_cache(maxsize=64)
def slots(pipeline: Pipeline, micro_batches: int, with_backward: bool = True) -> Sequence[Slot]:
    """The schedule slot by slot, in the order in which passes end; what a slot has is used in later ones only."""
    starts = pipeline.starts(micro_batches, with_backward, BACKWARD_COST)
    ends = {action: start + (1 if action.is_forward else BACKWARD_COST) for action, start in starts.items()}
    table: dict[int, list[Action | None]] = {end: [None] * pipeline.stages for end in sorted(set(ends.values()))}
    for action, end in ends.items():
        table[end][pipeline.stage(action)] = action
    return list(table.values())


def idle_share(pipeline: Pipeline, starts: Mapping[Action, int], backward_cost: int = 1) -> float:
    """Share of all stages' time, from the first start to the last end, in which nothing is computed."""
    costs = {action: 1 if action.is_forward else backward_cost for action in starts}
    length = max((start + costs[action] for action, start in starts.items()), default=0)
    return 1 - sum(costs.values()) / (length * pipeline.stages) if length else 0.0


def _groups(micro_batches: int, least: int) -> list[range]:
    """Micro batches in groups of nearly equal size, not smaller than `least` unless there are fewer in all."""
    count = max(1, micro_batches // least)
    bounds = [micro_batches * group // count for group in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
