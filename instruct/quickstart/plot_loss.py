"""Draw the loss curve of a training log."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.config import option, parse_command, run_entry

LINE = re.compile(r"^ iteration +(\d+)/.*\| lm loss: ([^ ]+) \|", re.M)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Loss curve."""

    log: str = option(help="What finetune.py printed.")
    out: str = option(help="Picture to write (.png).")


def main(argv: list[str]) -> None:
    """Read the log, draw, save."""
    (options,) = parse_command(argv, Options, prog="plot_loss.py", description=__doc__ or "")
    points = [(int(i), float(loss)) for i, loss in LINE.findall(Path(options.log).read_text(encoding="utf-8"))]
    if not points:
        raise ValueError(f"{options.log} has no line of an iteration")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="iteration", ylabel="training loss", yscale="log", title="Loss of the answers' tokens")
    axes.grid(alpha=0.3)
    figure.savefig(options.out, dpi=120)
    print(f"loss: {points[0][1]:.3f} at iteration {points[0][0]}, {points[-1][1]:.3f} at iteration {points[-1][0]}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
