"""A report for the terminal, in colour or plain."""

from collections.abc import Iterator, Sequence

from megatron.inspection.report import Bin, Line, Report
from megatron.inspection.samples import LINE_BREAK, SPACE, Gap, Part, Sample, Token, role_name
from megatron.tokenizer.chat import Role

ROLE_COLOURS: dict[int, str] = {Role.SYSTEM: "35", Role.PROMPTER: "36", Role.ASSISTANT: "32"}
PLAIN, HEADING, BOLD, DIM, REVERSED, NOTABLE, STRAY = "39", "1;4", "1", "2", "7", "1;33", "1;97;41"
LEARNED, CUT_OFF = ["1", "4"], ["2", "9"]
BORDER = "│"
BAR_WIDTH = 50
EIGHTHS = " ▏▎▍▌▋▊▉"


class TextReport:
    """Turns reports into lines of text; colours are ANSI escape sequences."""

    def __init__(self, *, is_coloured: bool) -> None:
        self._is_coloured = is_coloured

    def lines(self, report: Report) -> Iterator[str]:
        """Samples, then figures."""
        yield self._paint(report.files.prefix, HEADING)
        yield from report.notes()
        if report.samples:
            yield from ("", self._legend(report))
        for sample in report.samples:
            yield from ("", *self._sample(sample))
        yield from ("", *self._table(report.lines()))
        yield from ("", *self._histogram(report.bins(), report))
        if report.layouts:
            yield from ("", *self._layouts(report))

    def _paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self._is_coloured and codes else text

    def _legend(self, report: Report) -> str:
        """How tokens are painted; plain text has brackets instead."""
        if not self._is_coloured:
            return f"{BORDER}between tokens{BORDER}  [special token]  {LINE_BREAK} line break  {SPACE} space"
        roles = [self._paint(role_name(role), _colour(role)) for role in Role] if report.files.roles else []
        styles = {"learned": LEARNED, "cut off": CUT_OFF} if report.files.roles else {"not learned": [DIM]}
        styles |= {"special": [REVERSED], "not in the vocabulary": [STRAY]}
        return "  ".join([*roles, *(self._paint(name, *codes) for name, codes in styles.items())])

    def _sample(self, sample: Sample) -> Iterator[str]:
        yield self._paint(sample.title, BOLD)
        width = max(len(_label(part)) for part in sample.parts) if sample.parts else 0
        for part in sample.parts:
            label = _label(part)
            for line in [f" {part.left_out:,} tokens not shown"] if isinstance(part, Gap) else self._part(part):
                yield self._paint(f"{label:{width}}", *_label_codes(part)) + "  " + line
                label = ""

    def _part(self, part: Part) -> Iterator[str]:
        """Tokens with their borders; a line ends where the text's does."""
        border, line = self._paint(BORDER, DIM), ""
        for token in part.tokens:
            shown = f"[{token.visible}]" if token.is_special and not self._is_coloured else token.visible
            line += border + self._paint(shown, *_codes(part, token))
            if token.visible.endswith(LINE_BREAK):
                yield line + border
                line = ""
        if line:
            yield line + border

    def _table(self, lines: Sequence[Line]) -> Iterator[str]:
        width = max(len(line.name) for line in lines)
        for line in lines:
            yield f"{line.name:{width}}  " + self._paint(line.value, *[NOTABLE] * line.is_notable)

    def _histogram(self, bins: Sequence[Bin], report: Report) -> Iterator[str]:
        yield self._paint(f"{report.files.unit}s by their length in tokens", BOLD)
        most = max(b.count for b in bins)
        width = max(len(b.name) for b in bins)
        for b in bins:
            bar, rest = divmod(round(b.count / most * BAR_WIDTH * 8), 8)
            drawn = "█" * bar + EIGHTHS[rest].strip()
            yield f"{b.name:>{width}}  {drawn}{' ' if drawn else ''}{b.count:,}"

    def _layouts(self, report: Report) -> Iterator[str]:
        yield self._paint(report.layout_title(), BOLD)
        yield from _columns(report.layout_table())


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (
            f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others])


def _label(part: Part | Gap) -> str:
    return "…" if isinstance(part, Gap) else f"{part.name}, {part.fate}"


def _label_codes(part: Part | Gap) -> list[str]:
    return [DIM] if isinstance(part, Gap) else [_colour(part.role)]


def _colour(role: int | None) -> str:
    return PLAIN if role is None else ROLE_COLOURS.get(role, STRAY)


def _codes(part: Part, token: Token) -> list[str]:
    """How a token is painted. Where all text is learned, what is not learned stands out instead."""
    if not token.is_known:
        return [STRAY]
    is_learned = token.weight == 1
    codes = [_colour(part.role)]
    codes += LEARNED * is_learned if part.role is not None else [DIM] * (token.position > 0 and not is_learned)
    codes += [REVERSED] * token.is_special
    return codes if part.is_used else [*codes, *CUT_OFF]
