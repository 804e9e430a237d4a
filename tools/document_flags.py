"""Write docs/flags.md from the tables of options; with `--check`, write nothing and fail if it is stale."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config import FAMILIES, option, parse_command, run_entry
from megatron.config.option import Flag, flags_of
from megatron.config.reference_flags import ACCEPTED, ALIASES, LATER, REFUSED_FAMILIES
from megatron.config.run import RUN_GROUPS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
INTRODUCTION = """# Flags

Every flag of `finetune.py`, written by `tools/document_flags.py` from the code. Dashes and underscores are the same."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The page of flags."""

    check: bool = option(False, "Write nothing; fail if the page is not current.")


def main(argv: list[str]) -> None:
    """Write or check the page."""
    (options,) = parse_command(argv, Options, prog="document_flags.py", description=(__doc__ or "").splitlines()[0])
    text = "\n".join(page()) + "\n"
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise ValueError(f"{PAGE.name} is stale: run python tools/document_flags.py")


def page() -> Iterator[str]:
    """Lines of the page."""
    yield INTRODUCTION
    for group in RUN_GROUPS:
        yield from ("", f"## {(group.__doc__ or '').splitlines()[0].rstrip('.')}", "")
        yield from table(
            ("flag", "values", "default", "meaning"),
            ((f"`{f.flag}`", values(f), default(f), f.details["help"]) for f in flags_of(group)),
        )
    yield from ("", "## Family presets", "", "What `--model_name` requires and, in italics, advises.", "")
    rows = (
        (
            f"`{name}`",
            ", ".join([f"{k} = {v}" for k, v in f.requires.items()] + [f"*{k} = {v}*" for k, v in f.advises.items()]),
        )
        for name, f in FAMILIES.items()
    )
    yield from table(("family", "fields"), rows)
    yield from ("", "## Accepted without effect", "")
    yield from table(("flag", "why"), ((f"`{f.rstrip('=')}`", why) for f, why in ACCEPTED.items()))
    yield from ("", "## Other names", "")
    yield from table(("flag", "is the same as"), ((f"`{a}`", f"`{b}`") for a, b in ALIASES.items()))
    yield from ("", "## Refused", "", "They belong to what this toolkit does not have.", "")
    names = {what: ", ".join(f"`--{n}`" for n in n_.split()) for what, n_ in REFUSED_FAMILIES.items()}
    yield from table(("flags", "belong to"), ((flags, what) for what, flags in names.items()))
    yield from ("", "## Not available yet", "")
    yield from (f"- `{flag}`: {what}" for flag, what in LATER.items())


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def values(flag: Flag) -> str:
    """What may follow the flag."""
    if flag.is_switch or flag.details["choices"]:
        return ", ".join(map(str, flag.details["choices"] or ()))
    kind = "true, false" if flag.kind is bool else flag.kind.__name__
    return kind + " ..." * flag.repeated + (f" in {flag.details['within']}" if flag.details["within"] else "")


def default(flag: Flag) -> str:
    """The value where the flag is not given."""
    return "" if flag.is_switch or flag.default in (None, ()) else f"`{flag.default}`"


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
