"""Compare evaluated runs: python experiments/compare.py --workdirs=DIR,DIR[,...]."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.comparison import load_runs, print_comparison
from robal_jax.reporting import terminal


def main(arguments: list[str]) -> None:
    """Flags to runs; everything else is robal_jax.comparison."""
    texts = {"workdirs": "folders of evaluated runs, separated by commas; the first is the reference"}
    values = cli.parse(arguments, texts, __doc__)
    print_comparison(load_runs([name for name in values["workdirs"].split(",") if name]), terminal())


if __name__ == "__main__":
    cli.run(main)
