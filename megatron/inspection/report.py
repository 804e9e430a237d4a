"""All that is said of one prefix, in words: what the terminal, the page and the picture show."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.data import Array
from megatron.inspection.figures import Figures, Limit
from megatron.inspection.layouts import Batching, LaidOut
from megatron.inspection.samples import Sample, role_name, visible
from megatron.inspection.token_files import TokenFiles
from megatron.inspection.views import CutSamples, View
from megatron.inspection.vocabulary import Vocabulary
from megatron.tokenizer.chat import Role

MOST_BINS = 16
MOST_SPECIAL = 10
ROUND_WIDTHS = (1, 2, 5)


@dataclass(frozen=True)
class Line:
    """A figure: what, how much, and whether it asks for a look."""

    name: str
    value: str
    is_notable: bool = False


@dataclass(frozen=True)
class Bin:
    """Rows of `start .. stop` tokens; the last bin has no `stop`."""

    start: int
    stop: int | None
    count: int

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.start:,} or more" if self.stop is None else f"{self.start:,} to {self.stop - 1:,}"


@dataclass(frozen=True)
class Report:
    """Everything about a prefix."""

    files: TokenFiles
    vocabulary: Vocabulary
    limit: Limit
    view: View
    figures: Figures
    batching: Batching | None
    layouts: Sequence[LaidOut]
    samples: Sequence[Sample]

    def notes(self) -> list[str]:
        """Lines to tell the user before all else."""
        is_missing = self.files.roles and not self.batching
        missing = ["without --seq_length and --micro_batch_size packing is not shown; no checkpoint is asked for them"]
        return [*self.vocabulary.notes, *(missing if is_missing else [])]

    def problems(self) -> list[str]:
        """What makes the data unfit for training."""
        figures, problems = self.figures, []
        if self.files.roles and figures.supervised == 0:
            problems.append("nothing is supervised: no token that is predicted is an assistant's")
        elif self.files.roles and figures.supervised == figures.predicted:
            problems.append("everything is supervised: all tokens that are predicted are an assistant's")
        if isinstance(self.view, CutSamples) and figures.tokens <= self.view.seq_length:
            sample = f"one sample of --seq_length {self.view.seq_length} and the token after it"
            problems.append(f"{figures.tokens:,} tokens are less than {sample}")
        for what, stray, known in (
            ("id", figures.stray_ids, f"outside the vocabulary of {self.vocabulary.size or 0:,}"),
            ("role", figures.stray_roles, f"none of {', '.join(f'{role:d} {role_name(role)}' for role in Role)}"),
        ):
            if stray.count:
                place = f"{self.files.unit} {stray.row}, position {stray.position}"
                problems.append(f"{place}: {what} {stray.value} is {known}; there are {stray.count:,} such tokens")
        return [f"{self.files.prefix}: {problem}" for problem in problems]

    def lines(self) -> list[Line]:
        """The figures."""
        return [*self._sizes(), *self._supervision(), *self._oddities(), *self._ids()]

    def _sizes(self) -> Iterator[Line]:
        figures, unit, lengths = self.figures, self.files.unit, self.files.lengths
        yield Line(f"{unit}s", f"{figures.rows:,}")
        yield Line("tokens", f"{figures.tokens:,}")
        if isinstance(self.view, CutSamples):
            value = f"{len(self.view):,} an epoch, of {figures.rows / max(len(self.view), 1):,.1f} documents each"
            yield Line(f"samples of --seq_length {self.view.seq_length}", value)
        for role, count in zip(Role, figures.tokens_per_role, strict=False):
            yield Line(f"  {role_name(role)}", _part(count, figures.tokens))
        median, high = np.percentile(lengths, [50, 99], method="lower")
        yield Line(
            "length",
            f"shortest {int(lengths.min()):,}, median {median:,}, mean {figures.tokens / figures.rows:,.1f}, "
            f"99 % have at most {high:,}, longest {int(lengths.max()):,}",
        )

    def _supervision(self) -> Iterator[Line]:
        figures, limit = self.figures, self.limit
        if limit.seq_length and self.files.roles:
            fate = "are left out" if limit.drops else "are cut off"
            lost = f" {fate}, which loses {_part(figures.unused, figures.tokens)} tokens" if figures.longer else ""
            value = _part(figures.longer, figures.rows) + lost
            yield Line(f"longer than --seq_length {limit.seq_length}", value, bool(figures.longer))
        if self.files.roles:
            share = f"{figures.supervised_share:.1%}: {figures.supervised:,} of {figures.predicted:,} predicted tokens"
            yield Line("supervised share", share, figures.supervised in (0, figures.predicted))
            yield Line(
                "rows without supervision", _part(figures.unsupervised, figures.rows), bool(figures.unsupervised)
            )

    def _oddities(self) -> Iterator[Line]:
        figures, unit = self.figures, self.files.unit
        yield Line(f"empty {unit}s", f"{figures.empty:,}", bool(figures.empty))
        first = figures.first_duplicate
        example = f"; the first: {unit} {first[0]} equals {unit} {first[1]}" if first else ""
        yield Line(f"duplicate {unit}s", _part(figures.duplicates, figures.rows) + example, bool(figures.duplicates))
        if self.vocabulary.bos_id is not None:
            yield Line(f"{unit}s with a double BOS", f"{figures.double_bos:,}", bool(figures.double_bos))
        if self.vocabulary.eod_id is not None and not self.files.roles:
            whole = figures.ended == figures.rows - figures.empty
            yield Line("documents that end with EOD", _part(figures.ended, figures.rows), not whole)

    def _ids(self) -> Iterator[Line]:
        ids = self.figures.ids
        if len(ids):
            yield Line("ids in use", f"{np.count_nonzero(ids):,} of {len(ids):,}")
            counts = sorted(((int(ids[i]), name) for i, name in self.vocabulary.special.items()), reverse=True)
            found = [f"{visible(name)} {count:,}" for count, name in counts if count]
            rest = [f"{len(found) - MOST_SPECIAL:,} more"] if len(found) > MOST_SPECIAL else []
            yield Line("special tokens", ", ".join([*found[:MOST_SPECIAL], *rest]) or "none")

    def bins(self) -> list[Bin]:
        """How many rows are how long."""
        return histogram(self.files.lengths)

    def layout_table(self) -> list[tuple[str, ...]]:
        """Under a row of headings, a row for each way to lay rows out."""
        heads = ("rows are", "micro batches", "tokens in each", "padding", "busiest rank")
        return [
            heads,
            *(
                (
                    *(way.name, f"{way.micro_batches:,.1f}", f"{way.tokens:,.0f}"),
                    *(f"{way.padded_share:.1%}", f"+{way.imbalance:.1%}"),
                )
                for way in self.layouts
            ),
        ]

    def layout_title(self) -> str:
        """Of that table."""
        batching = self.batching
        assert batching
        return (
            f"global batches of {batching.global_batch_size:,} {self.files.unit}s on {batching.ranks} data-parallel "
            f"rank{'s' * (batching.ranks > 1)}, --micro_batch_size {batching.rows.micro_batch_size} "
            f"--seq_length {batching.rows.seq_length}"
        )


def histogram(lengths: Array) -> list[Bin]:
    """Bins of a round width that hold all but the longest hundredth; what is longer is in the last one."""
    high = int(np.percentile(lengths, 99, method="lower")) + 1
    width = next(w for n in range(20) for w in (r * 10**n for r in ROUND_WIDTHS) if w * MOST_BINS >= high)
    count = -(-high // width)
    found = np.bincount(np.minimum(lengths // width, count), minlength=count + 1).tolist()
    bins = [Bin(i * width, (i + 1) * width, number) for i, number in enumerate(found[:-1])]
    return [*bins, *([Bin(count * width, None, found[-1])] if found[-1] else [])]


def _part(count: int, whole: int) -> str:
    return f"{count:,} ({count / whole:.1%})" if count else "0"
