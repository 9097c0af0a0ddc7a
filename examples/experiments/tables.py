"""Markdown tables, as all reports write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_line(cells: Iterable[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_table(heads: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """The heads, the rule below them, and a line for each row."""
    return "\n".join([table_line(heads), "|---" * len(heads) + "|", *map(table_line, rows)])
