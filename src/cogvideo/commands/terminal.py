"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], num_texts: int = 1) -> Table:
    """A table whose first `num_texts` columns are texts, and the others figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < num_texts else "right")
    for row in rows:
        table.add_row(*row)
    return table
