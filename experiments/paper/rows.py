"""Rows and tables: what ``experiments/reproduce.py`` can make.

A row is a config with overrides. The tables of the paper are in ``published``, those of the methods after it
in ``followups``, that of a small network on CIFAR-10-LT in ``small``; ``catalogue`` has them all by name.
"""

from collections.abc import Mapping
from typing import NamedTuple

DATA_SETS = {"digits_lt": "digits_lt", "cifar10_lt": "CIFAR-10-LT", "cifar100_lt": "CIFAR-100-LT"}

CIFAR = ("cifar10_lt", "cifar100_lt")


class Elsewhere(NamedTuple):
    """Figures of a method that were published with a protocol of their own; a dash is not known.

    Attributes:
      data: data set and imbalance ratio.
      network: its name.
      clean: accuracy in percent, as printed.
      pgd: under PGD-20.
      aa: under AutoAttack, as far as ``attack`` says.
      attack: which AutoAttack: its iterations, or its attacks.
      epsilon: radius.
      checkpoint: how it was chosen.
      source: first-hand, the authors' own; or second-hand, and whose.
    """

    data: str
    network: str
    clean: str
    pgd: str
    aa: str
    attack: str
    epsilon: str
    checkpoint: str
    source: str


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      key: its name on the command line.
      stage: heading of the rows that belong together.
      label: its name in the paper.
      config: name of the config file.
      cifar10: published figures on CIFAR-10-LT, in the order of the table's columns.
      cifar100: the same on CIFAR-100-LT.
      overrides: its changes to the config, such as ``loss.margin=0.2``.
      settings: overrides to try in the evaluation, '' for none; the best by ``CHOSEN_BY`` is shown.
      start: a config whose run of the same seed is fine-tuned; '' for none.
      baseline: key of the row to compare with.
      data: data sets that have this row.
      teacher: a config whose run of the same seed teaches; '' for none.
      elsewhere: figures that were published with other protocols.
      unpublished: why there are none; '' if there are, and in the tables of the paper.
      seeds: number of its seeds at most; 0: as many as are asked for.
    """

    key: str
    stage: str
    label: str
    config: str
    cifar10: tuple[float, ...] = ()
    cifar100: tuple[float, ...] = ()
    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("",)
    start: str = ""
    baseline: str = "at"
    data: tuple[str, ...] = tuple(DATA_SETS)
    teacher: str = ""
    elsewhere: tuple[Elsewhere, ...] = ()
    unpublished: str = ""
    seeds: int = 0


class Further(NamedTuple):
    """A further evaluation of every run of a table.

    Attributes:
      name: of the evaluation.
      overrides: its changes to the config of the row's evaluation.
      transfer: keys of rows; the audit makes images on the run, of the same seed, of the first one that is
        another row. (): none.
    """

    name: str
    overrides: tuple[str, ...]
    transfer: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table that ``experiments/reproduce.py`` makes.

    Attributes:
      title: what it shows.
      columns: published conditions; our 'worst' is added to them.
      baseline: name of the row that others are compared with.
      rows: all rows.
      note: a remark for the reader.
      protocol: overrides of all rows, by data set.
      follow_up: whether the table is of the methods after the paper: rows are compared with the row above,
        and figures of other protocols and costs are shown.
      further: evaluations of every run that the table itself does not show.
    """

    title: str
    columns: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    note: str = ""
    protocol: Mapping[str, tuple[str, ...]] = {}
    follow_up: bool = False
    further: tuple[Further, ...] = ()
