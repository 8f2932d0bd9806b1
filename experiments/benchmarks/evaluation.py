"""PGD-20 and AutoAttack beside torchattacks: python experiments/benchmarks/evaluation.py [--networks=...].

Each network is a random backbone with a head fitted to a toy task. Epsilon is chosen so that about half of
the images survive, because an attack that breaks all images at once has nothing to do. Both sides have the
same weights.

Ours runs as in ``experiments/evaluate.py``, in float32, and on an accelerator also at its default precision
(TF32 on a GPU, as PyTorch's convolutions). torchattacks runs as it is, and with the network in channels_last.
All run in turn, each in its own process; compilation is reported separately. The robust accuracies, and the
number of images whose outcome differs from that of torchattacks as it is, stand beside the times, because a
weak attack is fast.

``torchattacks.AutoAttack`` makes 10 steps where AutoAttack makes 100, and has a different schedule for
Square. So its four attacks get AutoAttack's constants here and run one after the other on the remaining
images, as in that class. Needs PyTorch and torchattacks (pip install --no-deps torchattacks).
"""

import math
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import chex
import numpy as np

from experiments.benchmarks import measure, step
from robal_jax import cli

CLASSES, LARGEST, TRAINING_IMAGES = 10, 255, 512
EPSILON = {"digits_cnn": 12.0, "wrn_16_2": 2.0, "resnet20": 2.5, "resnet18": 2.5, "wrn_34_10": 2.0}
"""In 255ths; random features of a deep network are fragile."""

Way = Callable[[], np.ndarray]
"""Runs an attack; returns which images are classified correctly before and after it, bool ``[n]``."""


class Settings(NamedTuple):
    """The settings of the attacks of both sides.

    Attributes:
      epsilon: radius in L-infinity.
      steps: of APGD and FAB.
      queries: of Square.
      batch: images per call; ours takes at most what an evaluation takes at once.
    """

    epsilon: float
    steps: int
    queries: int
    batch: int


class Network(NamedTuple):
    """A network of ours with its weights and the images to attack.

    Attributes:
      name: a key of ``step.NETWORKS``.
      params: of the network.
      stats: its batch-norm statistics.
      images: uint8 ``[n, H, W, C]``.
      labels: ``[n]``.
    """

    name: str
    params: chex.ArrayTree
    stats: chex.ArrayTree
    images: np.ndarray
    labels: np.ndarray


def toy_images(count: int, *, pixels: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels; an image shows the coarse pattern of its class with noise.

    The contrast of the pattern decides whether an attack breaks the image.
    """
    rng = np.random.default_rng(0)
    coarse = rng.choice([-1.0, 1.0], (CLASSES, 4, 4, channels))
    patterns = coarse.repeat(pixels // 4, 1).repeat(pixels // 4, 2)
    labels = rng.integers(0, CLASSES, count, dtype=np.int32)
    contrast = rng.uniform(0, 0.3, (count, 1, 1, 1))
    shown = 0.5 + contrast * patterns[labels] + rng.normal(0, 0.05, (count, pixels, pixels, channels))
    return np.rint(LARGEST * shown.clip(0, 1)).astype(np.uint8), labels


def as_floats(images: np.ndarray) -> np.ndarray:
    """Returns images in [0, 1], as the library does."""
    return images / np.float32(LARGEST)


def fitted(name: str, tests: int) -> Network:
    """Returns a random backbone with a head fitted to its features by least squares."""
    import jax

    pixels, channels = step.shape(name)
    images, labels = toy_images(TRAINING_IMAGES + tests, pixels=pixels, channels=channels)
    model, shown = step.job_of(name, "plain", 32, 1).model, as_floats(images[:TRAINING_IMAGES])
    params, stats = jax.device_get(jax.jit(model.init)(jax.random.key(0), shown[:1]))
    features_of = jax.jit(model.features)
    features = np.concatenate([features_of(params, stats, part) for part in np.split(shown, 8)])
    mean, centred = features.mean(0), features - features.mean(0)
    products = centred.T @ centred
    ridge = 0.01 * np.trace(products) / len(products) * np.eye(len(products))
    weights = np.linalg.solve(products + ridge, centred.T @ np.eye(CLASSES)[labels[:TRAINING_IMAGES]])
    weights = (10 * weights.T).astype(np.float32)  # logits of the size that trained networks have
    params = {**params, "classifier": {"weight": weights, "bias": -weights @ mean}}
    return Network(name, params, stats, images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:])


def ours(network: Network, attack: str, settings: Settings, precision: str) -> Way:
    """Returns an attack as an evaluation runs it."""
    import jax
    import jax.numpy as jnp

    from robal_jax import attacks, evaluation
    from robal_jax.attacks import ThreatModel, autoattack
    from robal_jax.devices.cpu import at_once
    from robal_jax.evaluation.victim import Victim

    labels, everyone = network.labels, np.arange(len(network.labels))
    victim = Victim(
        step.job_of(network.name, "plain", 32, 1, precision).model.predict,
        network.params,
        network.stats,
        network.images,
        labels,
        pixel_max=LARGEST,
        seed=0,
        batch_size=at_once(settings.batch, math.prod(network.images.shape[1:3]), jax.default_backend()),
        layout="jit",
    )
    threat = ThreatModel(settings.epsilon)
    clean = victim.compile(lambda logits_fn, keys, images, labels: jnp.argmax(logits_fn(images), -1))

    def pgd(logits_fn: Any, keys: Any, images: Any, labels: Any) -> Any:
        shown = attacks.pgd(
            logits_fn, keys, images, labels, threat=threat, steps=20, step_size=settings.epsilon / 4
        )
        return jnp.argmax(logits_fn(shown), -1)

    if attack == "pgd_20":
        compiled = victim.compile(pgd)
        return lambda: (clean(everyone) == labels) & (compiled(everyone) == labels)

    stages = autoattack.stages(attack, CLASSES, threat=threat, steps=settings.steps, queries=settings.queries)
    rounds = [victim.compile(partial(evaluation.attack_step, stage=stage, threat=threat)) for stage in stages]

    def run() -> np.ndarray:
        progress = autoattack.begin(labels, clean(everyone))
        for stage, one in zip(stages, rounds, strict=True):

            def on_batch(ids: np.ndarray, number: int, one: Callable = one) -> Any:
                found = one(ids, number=np.int32(number))
                return found["images"], found["pred"]

            for _ in autoattack.run(stage, on_batch, labels, progress, size=victim.size):
                pass
        return progress.broken_in == autoattack.ROBUST

    return run


def torch_ensemble(model: Any, epsilon: float, steps: int, queries: int) -> dict[str, Callable[[], Any]]:
    """Returns makers of torchattacks' L-infinity attacks, by our names; other settings are AutoAttack's."""
    import torchattacks

    common = {"norm": "Linf", "eps": epsilon}
    iterated = {**common, "steps": steps}
    return {
        "apgd_ce": lambda: torchattacks.APGD(model, **iterated, loss="ce"),
        "apgd_dlr": lambda: torchattacks.APGD(model, **iterated, loss="dlr"),
        "apgd_t": lambda: torchattacks.APGDT(model, **iterated, n_classes=CLASSES),
        "fab_t": lambda: torchattacks.FAB(model, **iterated, multi_targeted=True, n_classes=CLASSES),
        "square": lambda: torchattacks.Square(model, **common, n_queries=queries, resc_schedule=False),
    }


def theirs(network: Network, attack: str, settings: Settings, channels_last: bool) -> Way:
    """Returns the same attack of torchattacks on the same weights."""
    import torch
    import torchattacks

    from robal_jax.attacks import autoattack

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = in_torch(network).to(device)
    if channels_last:  # only the network: the attacks reshape images and need them contiguous
        model = model.to(memory_format=torch.channels_last)
        model.register_forward_pre_hook(lambda _, x: x[0].contiguous(memory_format=torch.channels_last))
    images = np.ascontiguousarray(np.moveaxis(as_floats(network.images), -1, 1))  # for the attacks' view
    x = torch.tensor(images, device=device).split(settings.batch)
    y = torch.tensor(network.labels, device=device).long().split(settings.batch)

    eps = settings.epsilon
    made = torch_ensemble(model, eps, settings.steps, settings.queries)
    made["pgd_20"] = lambda: torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=20)
    names = (attack,) if attack == "pgd_20" else autoattack.attack_names(attack)
    chosen = [made[name]() for name in names]

    @torch.no_grad()
    def right(x: Any, y: Any) -> Any:
        return model(x).argmax(1) == y

    def one_batch(x: Any, y: Any) -> np.ndarray:
        robust = right(x, y)
        if attack == "pgd_20":  # on all images, as ours
            return (robust & right(chosen[0](x, y), y)).cpu().numpy()
        for one in chosen:
            if robust.any():
                robust[robust.clone()] = right(one(x[robust], y[robust]), y[robust])
        return robust.cpu().numpy()

    return lambda: np.concatenate([one_batch(*part) for part in zip(x, y, strict=True)])


def twin(backbone: Any, params: chex.ArrayTree, stats: chex.ArrayTree) -> Any:
    """Returns our network with a linear head in PyTorch, in evaluation mode."""
    import torch

    from experiments.benchmarks.torch_networks import RoBal
    from robal_jax import pytorch

    arrays = pytorch.complete_state_dict(params, stats, {})
    classes, width = arrays["classifier.weight"].shape
    network = RoBal(backbone, torch.nn.Linear(width, classes))
    network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return network.eval()


def in_torch(network: Network) -> Any:
    """Returns the network in PyTorch."""
    from experiments.benchmarks import torch_networks as nets

    return twin(nets.BACKBONES[network.name]()[0], network.params, network.stats)


def clean_accuracy(network: Network) -> str:
    """Describes the clean accuracy of both sides and the largest difference of their logits."""
    import jax
    import torch

    shown, labels = as_floats(network.images), network.labels
    model = step.job_of(network.name, "plain", 32, 1, "highest").model
    ours = np.asarray(jax.jit(model.predict)(network.params, network.stats, shown))
    with torch.no_grad():
        theirs = in_torch(network)(torch.tensor(np.moveaxis(shown, -1, 1))).numpy()
    accuracies = [np.mean(logits.argmax(-1) == labels) for logits in (ours, theirs)]
    apart = np.abs(ours - theirs).max()
    return f"clean {accuracies[0]:.1%} and {accuracies[1]:.1%}, logits at most {apart:.1e} apart"


def compare(
    network: Network, attack: str, settings: Settings, precisions: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Prints and returns the rows of one attack on one network."""
    given = (network, attack, settings)
    ways: dict[str, Way] = {f"ours {p}": measure.in_own_process(ours, *given, p) for p in precisions}
    first = {name: seconds_of(way) for name, way in ways.items()}
    ways["torchattacks"] = measure.in_own_process(theirs, *given, False)
    ways["torchattacks, channels_last"] = measure.in_own_process(theirs, *given, True)
    robust: dict[str, np.ndarray] = {}
    kept = {name: partial(lambda name: robust.update({name: ways[name]()}), name) for name in ways}
    times = measure.interleaved(kept, repeats)
    best = min(seconds for name, seconds in times.items() if name not in first)
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {
            "network": network.name, "attack": attack, "images": len(network.labels),
            **settings._asdict(), "way": name, "seconds": seconds._asdict(),
            "robust_accuracy": float(robust[name].mean()),
            "differing_images": int(np.sum(robust[name] != robust["torchattacks"])),
        }  # fmt: skip
        text = (
            f"{network.name:11} {attack:9} {name:28} {seconds:.4g} ms, robust {row['robust_accuracy']:.1%}, "
            f"{row['differing_images']} differ"
        )
        if name in first:
            row["compilation_seconds"] = first[name] - seconds.median
            row["of_torchattacks"] = seconds.median / times["torchattacks"].median
            row["of_best_tuned"] = seconds.median / best.median
            text += (
                f"; {row['of_torchattacks']:.2f} of torchattacks, {row['of_best_tuned']:.2f} of its best; "
                f"compiled in {row['compilation_seconds']:.1f} s"
            )
        print(text, flush=True)
        rows.append(row)
    return rows


def seconds_of(way: Way) -> float:
    """Returns the time of one call."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "networks": f"some of {','.join(step.NETWORKS)}; digits_cnn if not given",
        "attacks": "split by ';': pgd_20, standard (AutoAttack), or a list such as apgd_ce,square; "
        "pgd_20;standard if not given",
        "images": "to attack, 200",
        "batch": "images per call; all if not given, of ours at most devices.cpu.at_once",
        "epsilon": "in 255ths; by default each network's own",
        "steps": "of APGD and FAB, 100",
        "queries": "of Square, 5000",
        "repeats": "timed calls of each, 3",
        "precision": "ours, one or more of config.evaluation.precision; highest if not given, and also "
        "default on an accelerator",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)

    import jax

    images, repeats = int(values["images"] or 200), int(values["repeats"] or 3)
    chosen = (values["attacks"] or "pgd_20;standard").split(";")
    usual = "highest" if jax.default_backend() == "cpu" else "highest,default"
    precisions = (values["precision"] or usual).split(",")
    rows: list[dict[str, Any]] = []
    print(measure.heading())
    print(f"Milliseconds for {images} images, medians of {repeats} (least-most), in turn")
    for name in (values["networks"] or "digits_cnn").split(","):
        network = fitted(name, images)
        epsilon = float(values["epsilon"] or EPSILON[name]) / LARGEST
        settings = Settings(
            epsilon,
            int(values["steps"] or 100),
            int(values["queries"] or 5000),
            int(values["batch"] or images),
        )
        print(f"\n{name}: epsilon {LARGEST * epsilon:g}/{LARGEST}, {clean_accuracy(network)}")
        for attack in chosen:
            rows += compare(network, attack, settings, precisions, repeats)
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
