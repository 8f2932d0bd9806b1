"""Export: python experiments/export_torch.py --workdir=DIR --out=FILE.safetensors [--checkpoint=DIR].

Writes a checkpoint as a PyTorch state_dict, with the names of RoBal's released code (backbone., classifier.)
or, with --naming=bare, those of a plain WideResNet (last layer fc), of a ResNet-18, 20 or 32 or of a
PreActResNet-18 (linear), or of DeepMind's WideResNet (logits). Linear layers read flattened images in
PyTorch's order, (c, h, w); a network that standardises its images has the buffers mean and std. It does not
need PyTorch.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from robal_jax import cli
from robal_jax.errors import InputError
from robal_jax.storage.files import check_replaceable

LAST_LAYERS = {
    "WideResNet": "fc.",
    "DeepMind WideResNet": "logits.",
    "ResNet-18": "linear.",
    "ResNet-20": "linear.",
    "ResNet-32": "linear.",
    "PreActResNet-18": "linear.",
}
"""Beginning of the last layer's names, by the beginning of the network's name."""


def bare_prefixes(config: ConfigDict, name: str) -> dict[str, str]:
    """Returns the prefixes of a network without the parts backbone and classifier, for ``robal_jax.pytorch``.

    Raises:
      InputError: the run's network has no such form.
    """
    last = next((last for network, last in LAST_LAYERS.items() if name.startswith(network)), None)
    if last is None or config.head.name != "linear":
        *names, other = LAST_LAYERS
        raise InputError(
            f"--naming=bare is for a {', '.join(names)} or {other} with a linear head; this run has a {name} "
            f"with head {config.head.name!r}; use --naming=released"
        )
    return {"backbone.": "", "classifier.": last}


def main(arguments: list[str]) -> None:
    """Writes the checkpoint of the flags to the file of the flags."""
    texts = {
        "workdir": "folder of the run",
        "out": "the file to write, FILE.safetensors",
        "checkpoint": "folder of one checkpoint; by default the one that is evaluated",
        "weights": "current or average, the run's config.average; those that are evaluated by default",
        "naming": "released (the default) or bare",
    }
    values = cli.parse(arguments, texts, __doc__)
    workdir, checkpoint = cli.run_and_checkpoint(values)
    if workdir is None or not values["out"]:
        raise InputError(f"--{'out' if workdir else 'workdir'} is missing; usage: {__doc__.splitlines()[0]}")
    out, naming = pathlib.Path(values["out"]), values["naming"] or "released"
    if out.suffix != ".safetensors":
        raise InputError(f"--out is {out}; name a .safetensors file")
    if naming not in ("released", "bare"):
        raise InputError(f"unknown naming {naming!r}; use --naming=released or --naming=bare")

    check_replaceable(out, '"checkpoint_sha256":')

    from robal_jax import averages, builder, exchange, pytorch
    from robal_jax.storage import checkpoints
    from robal_jax.storage.best import default_checkpoint
    from robal_jax.storage.config_file import read_config

    config = read_config(workdir)
    builder.validate(config)
    which = values["weights"] or config.evaluation.weights
    chosen = checkpoint or default_checkpoint(workdir, config.train.select)
    arrays, path, sha256 = checkpoints.read_latest(
        chosen or workdir, on_damage=checkpoints.previous_instead(print)
    )
    params, stats = averages.chosen(arrays, which).values()
    network = pytorch.architecture(pytorch.torch_shapes(params, stats))
    prefixes = bare_prefixes(config, network.name) if naming == "bare" else None
    origin = {"checkpoint": str(path), "checkpoint_sha256": sha256}
    state_dict = exchange.export_weights(out, config, params, stats, origin, prefixes)
    print(f"checkpoint {path} sha256 {sha256}")
    print(f"wrote {out}: a {network.name}, {network.num_classes} classes, {len(state_dict)} arrays")
    print(f"in PyTorch: model.load_state_dict(safetensors.torch.load_file({str(out)!r}))")


if __name__ == "__main__":
    cli.run(main)
