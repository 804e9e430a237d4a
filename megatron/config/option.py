"""A flag is a dataclass field: name, type, default, choices and help are said once, here is how they become a flag."""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, get_origin, get_type_hints


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] | None = None,
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
        nargs: as in argparse, for tuples; default "*".
        flag: the flag's name where it is not `--NAME` (or `--no_NAME` for a boolean that is True by default).
        positional: an argument without a flag.
        takes_value: a boolean given as `--NAME true|false` instead of by its presence.
        metavar: name of the value in `--help`.
    """
    details = {
        "help": help,
        "choices": choices,
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
