"""The figures of reports as a picture; needs matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.data.publish import write_whole
from megatron.inspection.report import Report
from megatron.inspection.samples import role_name
from megatron.tokenizer.chat import Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {Role.SYSTEM: "#a873c4", Role.PROMPTER: "#5b9bd5", Role.ASSISTANT: "#58a870"}
BAR, LIMIT = "#5b8dbf", "#d9822b"


def write_picture(reports: Sequence[Report], file: str) -> None:
    """Draw how long rows are and, of instruction data, who speaks their tokens; writes a PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    panels = [
        (draw, height, report)
        for report in reports
        for draw, height in [(_draw_lengths, 4), *([(_draw_roles, 1.6)] if report.files.roles else [])]
    ]
    heights = [height for _, height, _ in panels]
    figure = Figure((9, sum(heights)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for (draw, _, report), (one,) in zip(panels, axes, strict=True):
        draw(one, report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(Path(file), buffer.getvalue())


def _draw_lengths(axes: "Axes", report: Report) -> None:
    bins = report.bins()
    width = bins[0].stop or 1
    axes.bar([b.start for b in bins], [b.count for b in bins], width=0.94 * width, align="edge", color=BAR)
    axes.set_xticks([b.start for b in bins], [f"{b.start:,}{'+' * (b.stop is None)}" for b in bins])
    axes.set(xlim=(0, bins[-1].start + width), xlabel="tokens", ylabel=f"{report.files.unit}s")
    axes.set_title(report.files.prefix, size=10)
    axes.tick_params("x", labelsize=8)
    longest = report.limit.seq_length
    if longest and longest < bins[-1].start:
        axes.axvline(longest + 1, color=LIMIT, label=f"--seq_length {longest}")
        axes.legend()
    axes.spines[["top", "right"]].set_visible(False)


def _draw_roles(axes: "Axes", report: Report) -> None:
    figures, left = report.figures, 0
    for role, count in zip(Role, figures.tokens_per_role, strict=True):
        label = f"{role_name(role)} {count / max(figures.tokens, 1):.1%}"
        axes.barh([0], [count], left=left, color=COLOURS[role], label=label)
        left += count
    axes.set(xlabel=f"tokens; of those predicted, {figures.supervised_share:.1%} are supervised", yticks=[])
    axes.margins(x=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(Role), frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
