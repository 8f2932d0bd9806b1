"""Publish: python experiments/publish.py --workdir=DIR --out=FOLDER/NAME [--evaluations=FOLDER,FOLDER].

Writes FOLDER/NAME.safetensors (the weights that the run's config evaluates), FOLDER/NAME.json (a card with
the config, the figures of the evaluations and images to check the model on) and FOLDER/NAME.robustbench.json.
--authors and --license say whose they are. robal_jax.load_model loads them; those in experiments/zoo ship
with the library. A run that evaluate.py --model=FOLDER/NAME made adds its evaluations to the card of that
model.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.errors import InputError
from robal_jax.reporting.results import WITHOUT_RESULTS
from robal_jax.storage import buckets


def main(arguments: list[str]) -> None:
    """Passes the flags to ``robal_jax.zoo.publish``."""
    texts = {
        "workdir": "folder of the run, evaluated, or its URL in a bucket",
        "out": "the files to write, without their endings: experiments/zoo/digits_lt/at_small_cnn",
        "evaluations": "folders of results, with commas between; by default WORKDIR/evaluation. The card "
        "names them like the folders, or as in whole=runs/x/evaluation",
        "authors": "of the model, for the card for RobustBench; N/A by default, or those of the earlier card",
        "license": "of the weights, such as Apache-2.0; by default 'not stated', or that of the earlier card",
    }
    values = cli.parse(arguments, texts, __doc__)
    for name in ("workdir", "out"):
        if not values[name]:
            raise InputError(f"--{name} is missing; usage: {__doc__.splitlines()[0]}")

    from robal_jax import zoo  # after the cheap checks: it imports JAX

    evaluations: dict[str, pathlib.Path] = {}
    for each in filter(None, values["evaluations"].split(",")):
        name, _, folder = each.partition("=")
        if not folder or "/" in name:  # it is a path, which may itself have this sign
            name, folder = pathlib.Path(each).name, each
        if name in evaluations:
            raise InputError(f"two evaluations are named {name!r}; name them, as in whole={folder}")
        if not name:
            raise InputError(f"--evaluations has {each!r}; write a name before '=', as in whole={folder}")
        evaluations[name] = buckets.fetched(folder, WITHOUT_RESULTS)
    workdir, out = buckets.fetched(values["workdir"]), pathlib.Path(values["out"])
    stated = {name: values[name] for name in ("authors", "license")}
    for file in zoo.publish(workdir, out, evaluations, **stated):
        print(f"wrote {file}")


if __name__ == "__main__":
    cli.run(main)
