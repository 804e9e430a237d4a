"""Command line to options: the adapter between dataclasses and argparse."""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from megatron.config.errors import UsageError
from megatron.config.option import Flag, flags_of

FLAG = re.compile(r"--[A-Za-z][\w-]*")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_flags(argv: Sequence[str], groups: Sequence[type], *, prog: str, description: str) -> dict[str, Any]:
    """The flags that were typed, by field name, and only those.

    Dashes and underscores in flag names are the same; `--flag value` and `--flag=value` both work; names are never
    abbreviated. `--help` prints all flags by group and exits.

    Raises:
        UsageError: an unknown flag (the nearest known one is named), a wrong value, a missing required flag.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [flags]" if len(groups) > 1 else None,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )
    for group in groups:
        section = parser.add_argument_group(title(group)) if len(groups) > 1 else parser
        for flag in flags_of(group):
            _add(section, flag)
    words = [with_underscores(word) for word in argv]
    known = {"--help", *(flag.flag for group in groups for flag in flags_of(group))}
    for word in words:  # before argparse, which would rather speak of a required flag that is missing
        name = word.partition("=")[0]
        if FLAG.fullmatch(name) and name not in known:
            raise UsageError(unknown_flag(name, known))
    typed, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(unknown_flag(unknown[0], known))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(typed).items()}


def build(groups: Sequence[type], typed: Mapping[str, Any]) -> tuple[Any, ...]:
    """An instance of each options dataclass, the typed values over the defaults."""
    return tuple(group(**{f.name: typed[f.name] for f in fields(group) if f.name in typed}) for group in groups)


def parse_command(argv: Sequence[str], *groups: type, prog: str, description: str) -> tuple[Any, ...]:
    """An instance of each options dataclass from the command line of a tool."""
    return build(groups, parse_flags(argv, groups, prog=prog, description=description))


def title(group: type) -> str:
    """Heading of a group: the first line of its docstring."""
    return (group.__doc__ or group.__name__).splitlines()[0].rstrip(".").lower()


def with_underscores(word: str) -> str:
    """`--micro-batch-size=4` as `--micro_batch_size=4`; anything that is not a flag unchanged."""
    name, equals, value = word.partition("=")
    if not FLAG.fullmatch(name):
        return word
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """What to say about an argument nobody knows."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {word!r}"
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return f"unknown flag {name}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def boolean(text: str) -> bool:
    """True or False from the command line."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def _add(section: Any, flag: Flag) -> None:
    details = flag.details
    arguments: dict[str, Any] = {"help": _help(flag), "default": argparse.SUPPRESS}
    if flag.is_switch:
        arguments |= {"action": "store_const", "const": not flag.turns_off}
    elif flag.kind is bool:
        arguments |= {"type": boolean, "nargs": "?", "const": True, "metavar": "{true,false}"}
    else:
        arguments |= {"type": flag.kind, "choices": details["choices"], "metavar": details["metavar"]}
    if flag.repeated:
        arguments["nargs"] = details["nargs"] or "*"
    if details["positional"]:
        if not flag.required and not flag.repeated:
            arguments["nargs"] = "?"
        section.add_argument(flag.name, **arguments)
        return
    section.add_argument(flag.flag, dest=flag.name, required=flag.required, **arguments)


def _help(flag: Flag) -> str:
    text = str(flag.details["help"]).replace("%", "%%")
    if flag.required or flag.is_switch or flag.default in (None, (), MISSING):
        return text
    return f"{text} [default: {flag.default}]"
