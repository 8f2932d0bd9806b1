"""All tables by name, and how to look up their rows."""

from collections.abc import Sequence

from experiments.paper.followups import FOLLOW_UPS
from experiments.paper.published import PAPER
from experiments.paper.rows import Row, Table
from experiments.paper.small import SMALL
from robal_jax.errors import InputError

TABLES: dict[str, Table] = {**PAPER, **FOLLOW_UPS, **SMALL}


def heading(name: str) -> str:
    """Returns how the Markdown of a table begins: 'RoBal table 1', or 'Table followups'."""
    return f"{'RoBal table' if name in PAPER else 'Table'} {name}"


def rows_of(name: str, data: str, keys: Sequence[str] = ()) -> tuple[Row, ...]:
    """Returns the rows of a table that a data set has, or the named ones among them.

    Raises:
      InputError: no such table or row, or a table of other data.
    """
    if name not in TABLES:
        raise InputError(f"unknown table {name!r}; use one of {', '.join(TABLES)}")
    rows = {row.key: row for row in TABLES[name].rows if data in row.data}
    if not rows:
        on = sorted({each for row in TABLES[name].rows for each in row.data})
        raise InputError(f"table {name} has no rows on {data}; it is made on {', '.join(on)}")
    unknown = [key for key in keys if key not in rows]
    if unknown:
        raise InputError(f"table {name} on {data} has no row {unknown[0]!r}; use one of {', '.join(rows)}")
    return tuple(row for row in rows.values() if not keys or row.key in keys)


def published(table: Table, row: Row, data: str) -> dict[str, float]:
    """Returns a row's published figures on a data set by condition, in percent."""
    figures = {"cifar10_lt": row.cifar10, "cifar100_lt": row.cifar100}.get(data)
    return dict(zip(table.columns, figures, strict=True)) if figures else {}
