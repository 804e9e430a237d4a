"""Inspection: see what will be trained on, before it is.

In: what a run was asked for (`inspect_run`).
Out: a `Report` for each prefix of data: some of it token by token, figures, what packing makes of it, and the problems
that make it unfit. `TextReport`, `write_page` and `write_picture` show reports.
"""

from megatron.inspection.inspect import Selection, inspect_run
from megatron.inspection.page import write_page
from megatron.inspection.picture import write_picture
from megatron.inspection.report import Report
from megatron.inspection.text import TextReport

__all__ = ["Report", "Selection", "TextReport", "inspect_run", "write_page", "write_picture"]
