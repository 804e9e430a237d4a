"""The pipeline's schedule over a grid of stages, chunks and micro batches, and the tool that draws it."""

import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from megatron.config import run_entry
from megatron.parallel.schedule import Action, Pipeline, Slot, idle_share, slots

ROOT = Path(__file__).resolve().parents[2]
PIPELINES = [Pipeline(1), *(Pipeline(stages, chunks) for stages in range(2, 9) for chunks in range(1, 5))]
MICRO_BATCHES = range(21)
main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / "show_schedule.py"))["main"]

every_pipeline = pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda p: f"{p.stages}x{p.chunks}")
every_interleaved = pytest.mark.parametrize(
    "pipeline", [p for p in PIPELINES if p.chunks > 1], ids=lambda p: f"{p.stages}x{p.chunks}"
)
with_and_without_backward = pytest.mark.parametrize("with_backward", [True, False], ids=["training", "evaluation"])


@cache
def schedules(pipeline: Pipeline, with_backward: bool) -> list[tuple[int, Sequence[Slot]]]:
    """(number of micro batches, slots) for all numbers of the grid."""
    return [(count, slots(pipeline, count, with_backward)) for count in MICRO_BATCHES]


def times(table: Sequence[Slot]) -> dict[Action, int]:
    """The slot of each action."""
    return {action: time for time, slot in enumerate(table) for action in slot if action}


@cache
def shares(pipeline: Pipeline) -> list[tuple[int, float]]:
    """(number of micro batches, idle share) for every number but 0: without backward passes, and for two costs."""
    return [
        (count, idle_share(pipeline, pipeline.starts(count, with_backward, cost), cost))
        for count in MICRO_BATCHES[1:]
        for with_backward, cost in [(False, 1), (True, 1), (True, 2)]
    ]


def most_in_flight(pipeline: Pipeline, stage: int, table: Sequence[Slot]) -> int:
    """Forward passes of a stage whose backward pass has not run."""
    actions = (slot[stage] for slot in table)
    return max(accumulate(1 if action.is_forward else -1 for action in actions if action), default=0)


@every_pipeline
@with_and_without_backward
def test_every_action_once_and_on_its_stage(pipeline: Pipeline, with_backward: bool) -> None:
    for count, table in schedules(pipeline, with_backward):
        assert {len(slot) for slot in table} <= {pipeline.stages}
        placed = [(stage, action) for slot in table for stage, action in enumerate(slot) if action]
        assert all(stage == action.virtual_stage % pipeline.stages for stage, action in placed)
        directions = [True, False] if with_backward else [True]
        virtual_stages = range(pipeline.stages * pipeline.chunks)
        expected = {Action(d, v, m) for d in directions for v in virtual_stages for m in range(count)}
        assert len(placed) == len(expected)
        assert {action for _, action in placed} == expected


@every_pipeline
@with_and_without_backward
def test_results_are_used_in_later_slots_than_they_are_made_in(pipeline: Pipeline, with_backward: bool) -> None:
    last = pipeline.stages * pipeline.chunks - 1
    for _, table in schedules(pipeline, with_backward):
        time = times(table)
        for action, used in time.items():
            is_forward, virtual_stage, micro_batch = action
            needed = set()
            if is_forward and virtual_stage > 0:
                needed.add(Action(True, virtual_stage - 1, micro_batch))
            if not is_forward:
                needed.add(Action(True, virtual_stage, micro_batch))
            if not is_forward and virtual_stage < last:
                needed.add(Action(False, virtual_stage + 1, micro_batch))
            assert all(time[one] < used for one in needed)
            assert set(pipeline.needs(action)) == needed
            target = pipeline.consumer(action)
            assert target is None or (action in pipeline.needs(target) and used < time[target])


@every_pipeline
@pytest.mark.parametrize("cost", [1, 3])
def test_a_stage_makes_one_pass_at_a_time_and_none_too_early(pipeline: Pipeline, cost: int) -> None:
    for count in MICRO_BATCHES:
        starts = pipeline.starts(count, backward_cost=cost)
        ends = {action: start + (1 if action.is_forward else cost) for action, start in starts.items()}
        for stage in range(pipeline.stages):
            order = pipeline.order(stage, count)
            assert all(ends[one] <= starts[following] for one, following in pairwise(order))
        assert all(ends[needed] <= start for action, start in starts.items() for needed in pipeline.needs(action))


@every_pipeline
@with_and_without_backward
def test_micro_batches_pass_a_virtual_stage_in_order(pipeline: Pipeline, with_backward: bool) -> None:
    """The last backward pass through a chunk, in which FSDP reduces, is that of the last micro batch."""
    for count, table in schedules(pipeline, with_backward):
        passed = defaultdict(list)
        for is_forward, virtual_stage, micro_batch in times(table):
            passed[is_forward, virtual_stage].append(micro_batch)
        assert all(micro_batches == list(range(count)) for micro_batches in passed.values())


@every_pipeline
def test_idle_share_is_the_textbooks(pipeline: Pipeline) -> None:
    """Interleaved too, and for any number of micro batches that is not smaller than the number of stages."""
    stages, chunks = pipeline.stages, pipeline.chunks
    for count, share in shares(pipeline):
        if chunks == 1 or count >= stages:
            assert share == pytest.approx(float(Fraction(stages - 1, count * chunks + stages - 1)), abs=1e-12)


@every_pipeline
def test_idle_share_with_fewer_micro_batches_than_stages(pipeline: Pipeline) -> None:
    """Interleaved, a round takes as long as there are stages, of which each works once for every micro batch."""
    stages, chunks = pipeline.stages, pipeline.chunks
    for count, share in shares(pipeline):
        if count < stages:
            busy = Fraction(count * chunks, stages * chunks + count - 1)
            assert share == pytest.approx(float(1 - busy), abs=1e-12)


@every_interleaved
def test_interleaving_leaves_less_idle(pipeline: Pipeline) -> None:
    """A single micro batch keeps one stage at a time busy either way."""
    for (count, share), (_, plain) in zip(shares(pipeline), shares(Pipeline(pipeline.stages)), strict=True):
        assert share < plain - 1e-9 if count > 1 else share == pytest.approx(plain)


@every_pipeline
def test_most_micro_batches_in_flight(pipeline: Pipeline) -> None:
    """A stage holds what fills the stages after it; interleaved, also all chunks but one of a group."""
    for count, table in schedules(pipeline, True):
        for stage in range(pipeline.stages):
            found, after = most_in_flight(pipeline, stage, table), pipeline.stages - 1 - stage
            if pipeline.chunks == 1:
                assert found == min(after + 1, count)
            elif count % pipeline.stages == 0:
                assert found == min(2 * after + (pipeline.chunks - 1) * pipeline.stages + 1, count * pipeline.chunks)
            else:  # groups are larger, but not twice as large
                assert found <= 2 * after + (pipeline.chunks - 1) * (2 * pipeline.stages - 1) + 1


def test_nothing_to_do() -> None:
    assert slots(Pipeline(4, 2), 0) == []
    assert idle_share(Pipeline(4, 2), {}) == 0.0


DRAWING = """\
stage 0  F0 F1 F2 .  .  .  .  B0--- .  B1--- .  B2---
stage 1  .  F0 F1 .  .  B0--- F2 B1--- .  B2--- .  .
stage 2  .  .  F0 B0--- F1 B1--- F2 B2--- .  .  .  .

length: 15 (a forward pass through one chunk is 1)
idle: 40.0% of all stages' time = (stages - 1) / (micro_batches + stages - 1)
most in flight, by stage: 3 2 1 (forward passes whose backward pass has not run)
"""
INTERLEAVED = """\
stage 0  F0a F1a F0b F1b .   .   B0b---- .   B1b---- B0a---- B1a----
stage 1  .   F0a F1a F0b B0b---- F1b B1b---- B0a---- B1a---- .   .

length: 15 (a forward pass through one chunk is 1)
idle: 20.0% of all stages' time = (stages - 1) / (chunks * micro_batches + stages - 1)
most in flight, by stage: 4 3 (forward passes whose backward pass has not run)
"""
EVALUATION = """\
stage 0  F0 F1 .
stage 1  .  F0 F1

length: 3 (a forward pass through one chunk is 1)
idle: 33.3% of all stages' time = (stages - 1) / (micro_batches + stages - 1)
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--stages 3 --micro_batches 3", DRAWING),
        ("--stages 2 --chunks 2 --micro_batches 2", INTERLEAVED),
        ("--stages 2 --micro_batches 2 --forward_only", EVALUATION),
    ],
)
def test_drawing(capsys: pytest.CaptureFixture[str], flags: str, expected: str) -> None:
    main(flags.split())
    assert capsys.readouterr().out == expected


def test_a_formula_is_given_only_where_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--stages", "4", "--chunks", "2", "--micro_batches", "4"])
    formula = "(stages - 1) / (chunks * micro_batches + stages - 1)"
    assert f"idle: 27.3% of all stages' time = {formula}\n" in capsys.readouterr().out
    main(["--stages", "4", "--chunks", "2", "--micro_batches", "3"])
    assert "idle: 40.0% of all stages' time\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--chunks", "4", "--micro_batches", "32"), ("--micro_batches", "1000")])
def test_a_wide_drawing_is_shortened_in_the_middle(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    main(["--stages", "8", *flags])
    lines = capsys.readouterr().out.splitlines()[:8]
    assert all(len(line) <= 240 and line.count("...") == 1 for line in lines)
    assert len({line.index("...") for line in lines}) == 1


def test_the_page_shows_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    command = "--stages 4 --chunks 2 --micro_batches 8"
    main(command.split())
    assert f"show_schedule.py {command}\n" in page
    assert f"```text\n{capsys.readouterr().out}```\n" in page


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--micro_batches 4", "--stages"),
        ("--stages 4", "--micro_batches"),
        ("--stages 0 --micro_batches 4", "--stages"),
        ("--stages 4 --micro_batches 0", "--micro_batches"),
        ("--stages 4 --micro_batches 4 --backward_cost 0", "--backward_cost"),
        ("--stages 4 --micro_batches 4 --chunks 0", "--chunks"),
        ("--stages 1 --micro_batches 4 --chunks 2", "--chunks"),
        ("--stages 4 --micro_batches 4 --chunk 2", "--chunks"),
    ],
)
def test_a_mistake_names_the_flag(capsys: pytest.CaptureFixture[str], argv: str, named: str) -> None:
    assert run_entry(main, argv.split()) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert named in error


@pytest.mark.parametrize("flags", ["", "--chunks 2", "--forward_only"])
def test_picture(tmp_path: Path, flags: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture"
    assert run_entry(main, ["--stages", "4", "--micro_batches", "8", *flags.split(), "--png", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run_entry(main, ["--stages", "2", "--micro_batches", "2", "--png", str(tmp_path / "none" / "a.png")]) == 1
    assert "a.png" in capsys.readouterr().err


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_entry(main, ["--stages", "2", "--micro_batches", "2", "--png", "a.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert run_entry(main, ["--stages", "2", "--micro_batches", "2"]) == 0


def test_drawing_needs_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "runpy.run_path('tools/show_schedule.py')['main'](['--stages', '2', '--micro_batches', '2'])\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
