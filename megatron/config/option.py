"""A flag is a dataclass field: name, type, default, choices and help are said once, here is how they become a flag."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, get_origin, get_type_hints

from megatron.config.errors import UsageError

INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] | None = None,
    within: str | None = None,
    nargs: str | None = None,
    flag: str | None = None,
    positional: bool = False,
    takes_value: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: value where the flag is not given; without one the flag is required.
        help: one line for `--help` and the docs.
        choices: values allowed.
        within: the interval of numbers allowed, such as "[0, 1)" or "[1, inf)".
        nargs: as in argparse, for tuples; default "*".
        flag: the flag's name where it is not `--NAME` (or `--no_NAME` for a boolean that is True by default).
        positional: an argument without a flag.
        takes_value: a boolean given as `--NAME true|false` instead of by its presence.
        metavar: name of the value in `--help`.
    """
    details = {
        "help": help,
        "choices": choices,
        "within": within,
        "nargs": nargs,
        "flag": flag,
        "positional": positional,
        "takes_value": takes_value,
        "metavar": metavar,
    }
    return field(default=default, metadata=details)


@dataclass(frozen=True)
class Flag:
    """A field seen as a flag.

    Attributes:
        name: of the field.
        flag: with dashes; for a positional argument the plain name.
        kind: type of one value.
        repeated: several values, a tuple.
        required: there is no default.
        turns_off: the flag is a switch that makes a boolean False.
    """

    name: str
    flag: str
    kind: type
    repeated: bool
    default: Any
    required: bool
    details: dict[str, Any]

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.kind is bool and not self.details["takes_value"]

    @property
    def turns_off(self) -> bool:
        """Whether the flag is a switch that makes its field False."""
        return self.is_switch and self.default is True


def check_values(options: Any) -> None:
    """Raise `UsageError` for the first field of an options dataclass outside its `choices` or `within`."""
    for item in fields(options):
        value = getattr(options, item.name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            choices, within = item.metadata["choices"], item.metadata["within"]
            if choices and one not in choices:
                raise UsageError(f"--{item.name} {one} is none of {', '.join(map(str, choices))}")
            if within and not _contains(within, one):
                raise UsageError(f"--{item.name} {one} is {_outside(within, one)}")


def _contains(interval: str, value: float) -> bool:
    opening, low, high, closing = _ends(interval)
    above = value >= low if opening == "[" else value > low
    below = value <= high if closing == "]" else value < high
    return above and below


def _outside(interval: str, value: float) -> str:
    """Where a number lies that is not in the interval, in words."""
    opening, low, _, _ = _ends(interval)
    if value <= 0 and (opening, low) in (("(", 0.0), ("[", 1.0)):
        return "not positive"
    return f"below {low:g}" if value < low else f"not in {interval}"


def _ends(interval: str) -> tuple[str, float, float, str]:
    match = INTERVAL.fullmatch(interval)
    assert match, interval
    return match[1], float(match[2]), float(match[3]), match[4]


def flags_of(group: type) -> Iterator[Flag]:
    """The flags of an options dataclass, in order."""
    hints = get_type_hints(group)
    for item in fields(group):
        details = dict(item.metadata)
        kind, repeated = _kind(hints[item.name])
        required = item.default is MISSING
        switch_off = kind is bool and item.default is True and not details["takes_value"]
        flag = details["flag"] or (f"--no_{item.name}" if switch_off else f"--{item.name}")
        if details["positional"]:
            flag = item.name
        yield Flag(item.name, flag, kind, repeated, None if required else item.default, required, details)


def _kind(hint: Any) -> tuple[type, bool]:
    """Type of one value, and whether the annotation is a tuple of them; `X | None` is X."""
    if isinstance(hint, UnionType):
        (hint,) = [part for part in hint.__args__ if part is not type(None)]
    if get_origin(hint) is tuple:
        return hint.__args__[0], True
    return hint, False
