"""``configs/README.md``: all config files, with the figures that the paper published for them."""

import ast
import itertools
import pathlib

from experiments.paper.catalogue import TABLES, published
from experiments.paper.followups import WITHOUT_TABLE
from experiments.paper.rows import CIFAR
from experiments.paper.table import aligned, elsewhere_table
from robal_jax.reporting.names import paper_name


def configs_readme(folder: pathlib.Path) -> str:
    """Returns the text of the README of a folder of config files."""
    columns = ("clean", "pgd_20", "robal_aa")
    header = ["Config", "Row of the paper", *(f"{paper_name(c)} {n}" for n in (10, 100) for c in columns)]
    body, others = [], []
    for path in sorted(folder.glob("*.py")):
        rows = [(n, row) for n in ("1", "2") for row in TABLES[n].rows if row.config == path.stem]
        if rows:
            labels = "; ".join(f"{n}: {row.label}" + f" ({row.stage})" * (n == "1") for n, row in rows)
            number, row = rows[-1]  # table 2 has both data sets, and agrees with table 1
            figures = [published(TABLES[number], row, data) for data in CIFAR]
            cells = [f"{of[c]:.2f}" if c in of else "—" for of in figures for c in columns]
            body.append([f"`{path.name}`", labels, *cells])
        else:
            about = ast.get_docstring(ast.parse(path.read_text())) or ""
            others.append(f"- `{path.name}`: {about.partition(chr(10))[0]}")
    tables = [_with_overrides(name) for name in ("3", "4")]
    return _README.format(
        table=aligned(header, body, left=2),
        others="\n".join(others),
        after=_after_the_paper(),
        tables="\n\n".join(tables),
    )


def _after_the_paper() -> str:
    """Returns the figures of the methods after the paper, each with its protocol."""
    tables = (table.rows for table in TABLES.values() if table.follow_up)
    rows = {row.key: row for row in (*itertools.chain(*tables), *WITHOUT_TABLE)}
    by_config = sorted(rows.values(), key=lambda row: row.config)
    named, shown = [], set()
    for row in by_config:  # two tables may have the same figures, with their data in other words
        new = [each for each in row.elsewhere if (row.config, each._replace(data="")) not in shown]
        shown |= {(row.config, each._replace(data="")) for each in row.elsewhere}
        named.append((f"`{row.config}.py`: {row.label}", [each._asdict() for each in new], ""))
    return elsewhere_table("Config", named)


def _with_overrides(name: str) -> str:
    """Returns the rows of a table whose configs are those of another one, with their overrides."""
    table = TABLES[name]
    header = ["Row of the paper", "Config", *map(paper_name, table.columns)]
    body = []
    for row in table.rows:
        figures = published(table, row, "cifar10_lt")
        if figures:
            settings = " or ".join(s.rpartition("=")[2] for s in row.settings if s)
            tried = [f"evaluation.tau_p={settings}"] if settings else []
            config = " ".join([f"{row.config}.py", *row.overrides, *tried])
            body.append(
                [f"{row.stage}: {row.label}", f"`{config}`", *(f"{figures[c]:.2f}" for c in table.columns)]
            )
    return f"Table {name}, {table.title} (CIFAR-10-LT). {table.note}\n\n{aligned(header, body, left=2)}"


_README = """\
# Configs

Each method has a config file, which takes the data set as its argument: `configs/at.py:cifar10_lt`. Its
docstring has the command. The figures are those of tables 1 and 2 of the RoBal paper, in percent:
WideResNet-34-10, last epoch. Columns 10 are of CIFAR-10-LT with IR 50, columns 100 of CIFAR-100-LT with
IR 10. IR, the imbalance ratio, is the number of training images of the largest class over that of the
smallest. AA is what the paper calls so: APGD-CE and APGD-T together. `experiments/reproduce.py` makes the
paper's tables with these configs.

{table}

Configs without a row in tables 1 and 2:

{others}

Published figures of the methods after the paper, in percent, each with its protocol. AutoAttack with 10
iterations is an upper estimate of that with 100. A dash: not known. `experiments/reproduce.py` trains these
methods with one protocol, with `--table=followups` and `--table=augmentation`.

{after}

{tables}

This file is made from the rows in `experiments/paper`:

    python -m experiments.paper.configs_readme > configs/README.md
"""


if __name__ == "__main__":
    print(configs_readme(pathlib.Path(__file__).resolve().parents[2] / "configs"), end="")
