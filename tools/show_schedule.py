"""Draw the schedule of a pipeline: `python tools/show_schedule.py --stages 4 --chunks 2 --micro_batches 8`."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate

from megatron.config import UsageError, option, parse_command, run_entry
from megatron.config.option import check_values

Row = list[tuple[int, int, bool, int, str]]  # passes: start, end, is backward, micro batch, letter of the chunk


@dataclass(frozen=True, kw_only=True)
class Options:
    """A pipeline and what goes through it."""

    stages: int = option(help="Ranks that a micro batch goes through, one after the other.", within="[1, inf)")
    chunks: int = option(1, "Chunks of layers that each stage holds; several are interleaved.", within="[1, 26]")
    micro_batches: int = option(help="Micro batches of a data-parallel rank in one iteration.", within="[1, inf)")
    backward_cost: int = option(2, "A backward pass takes as long as so many forward passes.", within="[1, inf)")
    forward_only: bool = option(False, "No backward passes, as in evaluation.")
    png: str | None = option(None, "Picture to write besides.", metavar="FILE")

    def __post_init__(self) -> None:
        check_values(self)
        if self.chunks > 1 and self.stages == 1:
            raise UsageError(f"--chunks {self.chunks} needs several --stages: one stage has nothing to interleave")
        if self.png and not find_spec("matplotlib"):
            raise UsageError("--png needs matplotlib: pip install matplotlib")


def main(argv: list[str]) -> None:
    """Print the drawing and what the schedule costs; make the picture."""
    (options,) = parse_command(argv, Options, prog="show_schedule.py", description=(__doc__ or "").splitlines()[0])
    from megatron.parallel.schedule import Pipeline, idle_share

    stages, chunks, count, cost = options.stages, options.chunks, options.micro_batches, options.backward_cost
    pipeline = Pipeline(stages, chunks)
    starts = pipeline.starts(count, not options.forward_only, cost)
    rows: list[Row] = [[] for _ in range(stages)]
    for action, start in starts.items():
        end = start + (1 if action.is_forward else cost)
        letter = chr(ord("a") + pipeline.chunk(action)) if chunks > 1 else ""
        rows[pipeline.stage(action)].append((start, end, not action.is_forward, action.micro_batch, letter))
    length, idle = max(row[-1][1] for row in rows), idle_share(pipeline, starts, cost)
    for stage, row in enumerate(rows):
        print(f"stage {stage:<{len(str(stages - 1))}}  {drawing(row, length, len(f'F{count - 1} ') + (chunks > 1))}")
    print(f"\nlength: {length} (a forward pass through one chunk is 1)")
    is_textbook = abs(idle - (stages - 1) / (chunks * count + stages - 1)) < 1e-9
    formula = f" = (stages - 1) / ({'chunks * ' * (chunks > 1)}micro_batches + stages - 1)"
    print(f"idle: {idle:.1%} of all stages' time" + formula * is_textbook)
    if not options.forward_only:
        most = (max(accumulate(-1 if is_backward else 1 for _, _, is_backward, *_ in row)) for row in rows)
        print("most in flight, by stage:", *most, "(forward passes whose backward pass has not run)")
    if options.png:
        picture(rows, length, f"{stages=}, {chunks=}, micro_batches={count}: {idle:.1%} idle", options.png)


def drawing(row: Row, length: int, width: int) -> str:
    """A stage's line, `width` characters a unit; if too long, without its middle, where schedules repeat themselves."""
    units, half = [".".ljust(width)] * length, 113 // width
    for start, end, is_backward, number, letter in row:
        cell = f"{'FB'[is_backward]}{number}{letter}".ljust((end - start) * width - 1, " -"[end - start > 1]) + " "
        units[start:end] = [cell[i : i + width] for i in range(0, len(cell), width)]
    return "".join(units if length * width <= 230 else [*units[:half], "... ", *units[-half:]]).rstrip()


def picture(rows: list[Row], length: int, title: str, file: str) -> None:
    """A box for each pass, with the number of its micro batch where it fits; time goes from left to right."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shades, inches = (colormaps["Blues"], colormaps["Oranges"]), min(max(8, length / 4), 40)
    figure = Figure((inches, 1.4 + 0.5 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots(subplot_kw={"title": title, "xlabel": "time", "ylabel": "stage", "facecolor": "0.93"})
    axes.set(xlim=(0, length), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    for stage, (start, end, is_backward, number, letter) in ((s, bar) for s, row in enumerate(rows) for bar in row):
        colour = shades[is_backward](min(0.3 + 0.1 * (ord(letter or "a") - ord("a")), 0.8))
        legend = f"{'backward' if is_backward else 'forward'} {letter}" if stage == number == 0 else None
        axes.add_artist(Rectangle((start, stage - 0.45), end - start - 0.06, 0.9, facecolor=colour, label=legend))
        if (end - start) * inches / length > 0.08 * len(str(number)):
            axes.text((start + end) / 2, stage, str(number), size=8, ha="center", va="center")
    figure.legend(loc="outside lower center", ncols=8)
    figure.savefig(file, format="png")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
