"""What a measurement's page has next to its table: the command that made it, and the file itself."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_text
from mammostream.common.options import resolved


def check_page(output: Path | None) -> None:
    """Raise BadInput where ``--output`` is given and names no Markdown page."""
    if output is not None and output.suffix != ".md":
        raise BadInput(f"--output {output} is no Markdown page; give a name that ends in .md")


def spelled(ctx: click.Context) -> str:
    """Return the command of `ctx` as it was typed, defaults written out.

    Folders are left out of names: where things lie is no part of a result.
    """
    given = {
        name: ",".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name
        for name, value in resolved(ctx).items()
        if value not in (None, [])
    }
    words = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in given.items()]
    return " ".join(["mammostream bench", str(ctx.command.name), *words])


def write_report(path: Path, title: str, lines: Sequence[str], markdown: str, command: str, chart: Path | None = None) -> None:
    """Write a table as a Markdown page with its description, its command and a chart that lies next to it."""
    body = "\n".join(f"- {line}" for line in lines)
    picture = f"\n![{title}]({chart.name})\n" if chart else ""
    write_text(path, f"# {title}\n\n{body}\n\n```\n{command}\n```\n\n{markdown}\n{picture}")
