"""Show what will be trained on: `python tools/show_data.py --data_path PREFIX [flags of finetune.py]`.

Exit code 0: the data can be trained on; 1: it cannot, and why; 2: wrong flags.
"""

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from megatron.config import UsageError, build, option, parse_run, run_entry
from megatron.config.entry import FAILED
from megatron.config.option import check_values


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is shown, and where."""

    samples: int = option(3, "How many rows to show token by token, evenly over the data.", within="[0, inf)")
    rows: tuple[int, ...] = option((), "Show these rows instead, counted from 0.", nargs="+", within="[0, inf)")
    most_tokens: int = option(1000, "Most tokens of a row that are shown, the first and the last.", within="[2, inf)")
    data_parallel_size: int = option(1, "Data-parallel ranks that a global batch is dealt to.", within="[1, inf)")
    color: str = option("auto", "Colours in the terminal.", choices=("auto", "always", "never"))
    html: str | None = option(None, "Page to write besides.", metavar="FILE")
    png: str | None = option(None, "Picture of lengths and roles to write besides.", metavar="FILE")

    def __post_init__(self) -> None:
        check_values(self)
        if self.png and not find_spec("matplotlib"):
            raise UsageError("--png needs matplotlib: pip install matplotlib")

    def wants_colour(self) -> bool:
        """Whether text for standard output is coloured; https://no-color.org is respected."""
        on_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return {"always": True, "never": False, "auto": on_terminal}[self.color]


def main(argv: list[str]) -> None:
    """Parse the flags, look at the data, and show it."""
    summary = (__doc__ or "").splitlines()[0]
    typed, _ = parse_run(argv, prog="show_data.py", description=summary, further=[Options])
    (options,) = build([Options], typed)
    from megatron.inspection import Selection, TextReport, inspect_run, write_page, write_picture  # --help needs none

    selection = Selection(count=options.samples, numbers=options.rows, most_tokens=options.most_tokens)
    text, reports = TextReport(is_coloured=options.wants_colour()), []
    for report in inspect_run(typed, options.data_parallel_size, selection):
        print("\n".join(text.lines(report)), flush=True)
        reports.append(report)
    if options.html:
        write_page(reports, options.html)
    if options.png:
        write_picture(reports, options.png)
    problems = [problem for report in reports for problem in report.problems()]
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        sys.exit(FAILED)


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
