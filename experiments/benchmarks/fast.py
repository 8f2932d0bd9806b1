"""The ensembles 'fast' and 'union' beside AutoAttack: python experiments/benchmarks/fast.py --workdir=DIR.

Attacks four kinds of models: 'digits' (AT and RoBal-N, five seeds, trained here by ``calibration.py``),
'golden' (the network of the released AutoAttack's numbers, if ROBAL_GOLDEN_DIR names their folder), 'cifar'
(the zoo's two ResNet-20, if --data names an .npz file of CIFAR-10) and 'masked' (the deterministic masks of
``masked.py``, on the models that ``calibration.py`` masks). Each is attacked by 'torchattacks' and 'union'
with one key, by 'fast' with several, and by 'standard' with one, or with several to see how it differs from
itself. 'union' continues after 'standard' with the first key, whose stages are its first. Prints one line per
model, and one table in Markdown per kind. Outcomes are kept in DIR, so that the same command resumes; they
hold as long as the attacks do not change.

Passes are counted from the rounds, the images that reach each, and the cost of a round, so they are those of
the algorithm, not of a batch that was filled up. A gradient is one forward and one backward pass.
"""

import importlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from experiments.benchmarks import calibration, masked, measure
from robal_jax import cli, load_model
from robal_jax.attacks import ThreatModel, autoattack
from robal_jax.data import balanced_part
from robal_jax.storage.files import replacing

TARGETS, BATCH, CLASSES = 9, 50, 10
VERSIONS = ("standard", "torchattacks", "fast", "union")


class Network(NamedTuple):
    """Models that differ in their weights and images only, so that they share what is compiled.

    Attributes:
      predict: ``(weights, images) -> logits``.
      epsilon: radius, L-infinity.
      members: name, weights, images ``[n, H, W, C]`` and labels ``[n]`` of each.
    """

    predict: Callable[[Any, Any], Any]
    epsilon: float
    members: list[tuple[str, Any, np.ndarray, np.ndarray]]


def networks(bench: calibration.Bench, images: dict[str, int], data: str) -> Iterator[tuple[str, Network]]:
    """Yields the kind of each network, and the network."""

    def of(
        kind: str, models: list[tuple[str, int]], name: str = "", mask: Callable = lambda model: model
    ) -> Network:
        runs = [bench.run("digits", *model) for model in models]
        predict = runs[0].predict
        return Network(
            lambda weights, x: mask(partial(predict, *weights))(x),
            runs[0].config["evaluation"]["epsilon"],
            [
                (
                    f"{name}{method} {seed}",
                    (run.params, run.stats),
                    *bench.sample(run, images[kind]),
                )
                for (method, seed), run in zip(models, runs, strict=True)
            ],
        )

    for method in ("at", "robal_n") if images["digits"] else ():
        yield "digits", of("digits", [(method, seed) for seed in calibration.SEEDS])
    folder = os.environ.get("ROBAL_GOLDEN_DIR")
    if folder and images["golden"]:
        with np.load(pathlib.Path(folder) / "autoattack.npz") as file:
            arrays = {name: np.float32(file[name]) for name in file if name.startswith("net/")}
            x, y = (np.asarray(file[name][: images["golden"]]) for name in ("x", "y"))
            epsilon = float(file["eps"])
        x = np.asarray(x.transpose(0, 2, 3, 1), np.float32)
        network = importlib.import_module("tests.parity.autoattack_net").network(arrays)
        yield "golden", Network(lambda _, x: network(x), epsilon, [("golden", (), x, y)])
    if data and images["cifar"]:
        with np.load(data) as file:
            ids = balanced_part(file["test_labels"], images["cifar"], seed=0)
            pixels, labels = file["test_images"][ids], file["test_labels"][ids]
        for name in ("cifar10_lt/at_resnet20", "cifar10_lt/robal_n_resnet20"):
            model = load_model(name)
            x, y = np.asarray(pixels / 255, np.float32), labels.astype(np.int32)
            member = (name.partition("/")[2], (model.params, model.stats), x, y)
            yield "cifar", Network(partial(_apply, model.predict), 8 / 255, [member])
    for name, (mask, expected) in masked.MASKS.items() if images["masked"] else ():
        if "randomised" not in expected:
            yield "masked", of("masked", list(calibration.BASES), f"{name}, ", mask)


def _apply(predict: Callable[..., Any], weights: tuple[Any, Any], x: Any) -> Any:
    return predict(*weights, x)


class Passes(NamedTuple):
    """Forward and backward passes through the network, of one image in one round or in a mean."""

    forward: float
    backward: float


def of_round(name: str, steps: int, queries: int) -> Passes:
    """Passes of one round of an attack on one image, with the forward pass that judges its result."""
    forward, backward = {
        "apgd_ce": (steps + 1, steps + 1),
        "apgd_t": (steps + 2, steps + 1),
        "apgd_malt": (steps + 2, steps + 1 + TARGETS),
        "fab_t": (2 * steps + 1, steps),
        "pma": (steps, steps),
        **dict.fromkeys(autoattack.SQUARES, (queries + 1, 0)),
    }[name]
    return Passes(forward + 1, backward)


def total(version: str, stages: tuple[autoattack.Stage, ...], broken_in: np.ndarray) -> Passes:
    """Mean passes per image of a whole ensemble; ``broken_in [n]`` as in ``autoattack.Progress``."""
    forward, backward = float(len(broken_in)), 0.0  # the clean images
    for stage in stages:
        if not autoattack.wanted(stage, autoattack.Progress(broken_in, broken_in, {})):
            continue
        part = "fast" if stage.name in ("pma", "apgd_malt") else version
        few = "standard" if stage.name == "square_full" else version
        steps, queries = autoattack.STEPS.get(part, 100), autoattack.QUERIES.get(few, 5000)
        cost = of_round(stage.name, steps, queries)
        for number in range(stage.first, stage.last + 1):
            reached = int(np.sum((broken_in == autoattack.ROBUST) | (broken_in >= number)))
            forward, backward = forward + reached * cost.forward, backward + reached * cost.backward
    return Passes(forward / len(broken_in), backward / len(broken_in))


def attacker(network: Network) -> Callable[..., np.ndarray]:
    """Returns a function that runs stages on a member; each attack is compiled once."""
    predict = jax.jit(network.predict)

    @partial(jax.jit, static_argnums=0)
    def attacked(attack: autoattack.Round, weights: Any, keys: Any, x: Any, y: Any, number: Any) -> Any:
        adversarial = attack(partial(network.predict, weights), keys, x, y, number)
        return adversarial, network.predict(weights, adversarial).argmax(-1)

    def attack_member(
        member: tuple[str, Any, np.ndarray, np.ndarray],
        stages: tuple[autoattack.Stage, ...],
        seed: int,
        broken_in: np.ndarray | None,
    ) -> np.ndarray:
        """Returns the round in which each image was broken; continues after the rounds of ``broken_in``."""
        _, weights, x, y = member
        keys = jax.random.split(jax.random.key(seed), len(x))
        progress = autoattack.begin(y, np.asarray(predict(weights, x)).argmax(-1))
        if broken_in is not None:
            progress = autoattack.Progress(broken_in.copy(), y.copy(), {}, stages[0].first)
        for stage in stages:

            def batch(
                ids: np.ndarray, number: int, stage: autoattack.Stage = stage
            ) -> tuple[np.ndarray, np.ndarray]:
                full = np.take(ids, range(BATCH), mode="clip")
                own = stage.keys(keys[full], number)
                found = attacked(stage.attack, weights, own, x[full], y[full], np.int32(number))
                images, predictions = (np.asarray(array)[: len(ids)] for array in found)
                return images, predictions

            for _ in autoattack.run(stage, batch, y, progress, size=BATCH):
                pass
        return progress.broken_in

    return attack_member


def outcomes(network: Network, keys: dict[str, int], folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields, for each member, its name, and by version the broken images with each key and mean passes.

    Args:
      network: models to attack.
      keys: number of keys by version, 1 if it is not there.
      folder: of the outcomes that are kept.
    """
    attack, threat = attacker(network), ThreatModel(network.epsilon)
    stages = {version: autoattack.stages(version, CLASSES, threat=threat) for version in VERSIONS}
    for member in network.members:
        name, _, x, _ = member
        row: dict[str, Any] = {"name": name}
        started = time.perf_counter()
        for version in VERSIONS:
            row[version] = []
            for seed in range(keys.get(version, 1)):
                path = folder / f"{name}-{len(x)}-{version}-{seed}.npy"
                if not path.exists():
                    done = len(stages["standard"]) if version == "union" else 0
                    before = row["standard"][seed] if done else None
                    found = attack(member, stages[version][done:], seed, before)
                    with replacing(path) as file:
                        np.save(file, found)
                row[version].append(np.load(path))
        row["passes"] = {
            version: Passes(
                *np.mean([total(version, stages[version], found) for found in row[version]], axis=0)
            )
            for version in VERSIONS
        }
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the outcomes of a kind of models in Markdown."""
    lines = [
        "| model | clean | standard, by key | torchattacks | fast, by key | union | alone: standard | "
        "torchattacks | fast | forward, backward: standard | torchattacks | fast | union | "
        "fast, % of backward, of all |",
        "| --- " + "| ---: " * 13 + "|",
    ]
    excess: dict[str, list[float]] = {"fast": [], "standard": []}
    share, whole = [], []
    for row in rows:
        robust = {version: [found == autoattack.ROBUST for found in row[version]] for version in VERSIONS}
        first = {version: robust[version][0] for version in VERSIONS[:3]}
        alone = [
            np.sum(np.all([right == (name != version) for name, right in first.items()], 0))
            for version in first
        ]
        passes = row["passes"]
        share.append(100 * passes["fast"].backward / passes["standard"].backward)
        whole.append(100 * sum(passes["fast"]) / sum(passes["standard"]))
        for version, runs in (("fast", robust["fast"]), ("standard", robust["standard"][1:])):
            excess[version] += [100 * (right.mean() - first["standard"].mean()) for right in runs]
        cells = [
            np.sum(row["standard"][0] != autoattack.CLEAN),
            *(", ".join(str(right.sum()) for right in robust[version]) for version in VERSIONS),
            *alone,
            *(f"{each.forward:.0f}, {each.backward:.0f}" for each in passes.values()),
            f"{share[-1]:.1f}, {whole[-1]:.1f}",
        ]
        lines.append(f"| {row['name']} | " + " | ".join(map(str, cells)) + " |")
    images = len(rows[0]["standard"][0])
    lines += ["", f"{images} images per model. Minus `standard` with the first key, in points:", ""]
    for name, found in (("`fast`", excess["fast"]), ("`standard` with other keys", excess["standard"])):
        if found:
            above = f"above in {np.sum(np.greater(found, 0))} of {len(found)} runs"
            spread = f"mean {np.mean(found):.2f}, from {min(found):.2f} to {max(found):.2f}"
            lines.append(f"- {name}: {spread}, {above}")
    return "\n".join(
        [
            *lines,
            "",
            f"Backward passes of `fast`: mean {np.mean(share):.1f} % of those of `standard`, at most "
            f"{max(share):.1f} %; all passes: {np.mean(whole):.1f} %, at most {max(whole):.1f} %.",
        ]
    )


def main(arguments: list[str]) -> None:
    """Prints one line per model, and one table per kind."""
    texts = {
        "workdir": "folder of trained models and outcomes",
        "seeds": "keys of 'fast', 3",
        "standard": "keys of 'standard', 1",
        "digits": "images per model of this kind, 0 for none: 200",
        "golden": "the same, 200",
        "cifar": "the same, 100",
        "masked": "the same, 50",
        "data": "an .npz file with test_images and test_labels of CIFAR-10, for this kind",
    }
    values = cli.parse(arguments, texts, __doc__)
    workdir = pathlib.Path(values["workdir"] or "runs/calibration")
    default = {"digits": 200, "golden": 200, "cifar": 100, "masked": 50}
    images = {kind: int(values[kind] or count) for kind, count in default.items()}
    folder = workdir / "fast"
    folder.mkdir(parents=True, exist_ok=True)
    print(measure.device())
    keys = {"fast": int(values["seeds"] or 3), "standard": int(values["standard"] or 1)}
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind, network in networks(calibration.Bench(workdir, ""), images, values["data"]):
        rows.setdefault(kind, []).extend(outcomes(network, keys, folder))
    for kind, found in rows.items():
        print(f"\n{kind}\n\n{table(found)}")


if __name__ == "__main__":
    cli.run(main)
