"""Reports as one HTML page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron.data.publish import write_whole
from megatron.inspection.report import Report
from megatron.inspection.samples import Part, Token, role_name
from megatron.tokenizer.chat import Role


def write_page(reports: Sequence[Report], file: str) -> None:
    """Write the page; everything from the data is escaped.

    Raises:
        OSError: it cannot be written.
    """
    loader = PackageLoader("megatron.inspection", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals.update(colour=_colour, classes=_classes, shade=_shade, title=_title, most=_most)
    page = environment.get_template("page.html").render(reports=reports, roles=[role_name(role) for role in Role])
    write_whole(Path(file), page.encode())


def _colour(part: Part) -> str:
    if part.role is None:
        return "plain"
    return role_name(part.role) if part.role in [*Role] else "odd"


def _classes(part: Part, token: Token) -> str:
    """How a token is drawn. Where all text is learned, what is not learned stands out instead."""
    is_learned = token.weight == 1
    classes = {
        "token": True,
        "learned": is_learned and part.role is not None,
        "ignored": token.position > 0 and not is_learned and part.role is None,
        "special": token.is_special,
        "cut": not part.is_used,
        "stray": not token.is_known,
    }
    return " ".join(name for name, is_so in classes.items() if is_so)


def _shade(part: Part, token: Token) -> float:
    return 0 if part.role is None else min(token.weight, 1)


def _title(part: Part, token: Token) -> str:
    return f"id {token.token_id} · position {token.position} · {part.name} · loss weight {token.weight:g}"


def _most(report: Report) -> int:
    return max(b.count for b in report.bins())
