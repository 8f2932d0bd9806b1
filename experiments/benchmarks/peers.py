"""Our attacks beside those of torchattacks and foolbox: python experiments/benchmarks/peers.py --workdir=RUN.

The network of a digits run is built in PyTorch with the same weights, and all attacks use the same test
images and the same constants. Prints the robust accuracy, the number of images on which a peer differs from
ours, and the seconds per image; then the median distances of the minimum-norm attacks. Needs PyTorch, foolbox
and torchattacks (pip install foolbox; pip install --no-deps torchattacks).
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchattacks
from foolbox.attacks.gradient_descent_base import clip_lp_norms

from experiments.benchmarks import evaluation, torch_networks
from robal_jax import attacks, builder, cli
from robal_jax.attacks import LogitsFn, ThreatModel, autoattack, clean_start
from robal_jax.data import to_float
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.storage.config_file import read_config

STEPS = 100


def main(arguments: list[str]) -> None:
    """Runs all attacks and prints a table in Markdown."""
    texts = {
        "workdir": "folder of a run on digits_lt with a linear head",
        "examples": "test images, 200",
        "norm": "linf (the default) or l2",
        "epsilon": "radius; the run's by default",
        "distances": "the minimum-norm attacks only",
        "ensemble": "the four attacks of torchattacks.AutoAttack only, as that package runs them",
        "only": "name of one attack, such as square, which alone is run",
    }
    values = cli.parse(arguments, texts, __doc__, switches=("distances", "ensemble"))
    if not values["workdir"]:
        raise InputError(f"--workdir is missing; usage: {__doc__.splitlines()[0]}")
    if values["only"] and values["distances"]:
        raise InputError("--only names no minimum-norm attack; leave out --only or --distances")
    workdir, norm = pathlib.Path(values["workdir"]), values["norm"] or "linf"
    job = builder.evaluation(read_config(workdir))
    arrays, *_ = checkpoints.read_latest(workdir)
    threat = ThreatModel(float(values["epsilon"] or job.threat.epsilon), norm)
    logits_fn = jax.jit(partial(job.predict, arrays["params"], arrays["stats"]))
    twin = evaluation.twin(torch_networks.SmallCNN(), arrays["params"], arrays["stats"])

    test, count = job.test, int(values["examples"] or 200)
    ids = np.random.default_rng(0).permutation(len(test.labels))[:count]
    images, labels = to_float(jnp.asarray(test.images[ids]), test.pixel_max), test.labels[ids]
    x, y = torch.tensor(np.moveaxis(np.asarray(images), -1, 1)), torch.tensor(labels.astype(np.int64))
    clean = np.asarray(logits_fn(images))
    apart = np.abs(clean - twin(x).detach().numpy()).max()
    print(f"{count} images, {norm}, epsilon {threat.epsilon:g}, largest difference of logits {apart:.1e}")
    print(f"clean accuracy {np.mean(clean.argmax(-1) == labels):.3f}")

    if values["ensemble"]:
        name = "torchattacks"
        return print_robust(
            our_stages(logits_fn, images, labels, autoattack.stages(name, 10, threat=threat)),
            their_ensemble(twin, x, y, threat),
            values["only"],
        )
    if not values["distances"]:
        ours, theirs = our_attacks(logits_fn, images, labels, threat), their_attacks(twin, x, y, threat)
        print_robust(ours, theirs, values["only"])
        if values["only"]:
            return
    print_distances(our_distances(logits_fn, images, labels, norm), their_distances(twin, x, y, norm))


Runs = dict[str, Callable[[], np.ndarray]]
"""By attack, or by peer: returns one outcome per image."""


def print_robust(ours: Runs, theirs: dict[str, Runs], only: str = "") -> None:
    """Prints a table in Markdown; an outcome is whether the image is still classified correctly.

    Raises:
      InputError: the name of the only attack is unknown.
    """
    if only:
        if only not in ours:
            raise InputError(f"unknown attack {only!r}; use one of {', '.join(ours)}")
        ours = {only: ours[only]}
    print("| attack | ours | peer | theirs | differing images | ours s/image | theirs s/image | compile s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, attack in ours.items():
        first, _ = timed(attack)
        seconds, robust = timed(attack)
        for peer, run in theirs[name].items():
            their_seconds, their_robust = timed(run)
            print(
                f"| {name} | {robust.mean():.3f} | {peer} | {their_robust.mean():.3f} | "
                f"{np.sum(robust != their_robust)} | {seconds / len(robust):.4f} | "
                f"{their_seconds / len(robust):.4f} | {first - seconds:.1f} |"
            )


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Returns the seconds of an attack, and what it returns."""
    started = time.perf_counter()
    outcomes = run()
    return time.perf_counter() - started, outcomes


def print_distances(ours: Runs, theirs: dict[str, Runs]) -> None:
    """Prints a table in Markdown; an outcome is a distance, infinite where nothing was found.

    A ratio is that of the distances of one image, ours over the peer's, where both found something.
    """
    heads = (
        "attack", "ours, median", "found", "peer", "theirs, median", "found", "ratio, median",
        "ratio, 5 % to 95 %", "ours s/image", "theirs s/image", "compile s",
    )  # fmt: skip
    for row in (heads, ("---",) * len(heads)):
        print(f"| {' | '.join(row)} |")
    for name, attack in ours.items():
        first, _ = timed(attack)
        seconds, mine = timed(attack)
        for peer, run in theirs[name].items():
            their_seconds, other = timed(run)
            both = np.isfinite(mine) & np.isfinite(other) & (mine > 0)
            low, middle, high = np.percentile(mine[both] / other[both], (5, 50, 95))
            print(
                f"| {name} | {np.median(mine):.4f} | {np.isfinite(mine).sum()} | {peer} | "
                f"{np.median(other):.4f} | {np.isfinite(other).sum()} | "
                f"{middle:.4f} | {low:.4f} to {high:.4f} | "
                f"{seconds / len(mine):.4f} | {their_seconds / len(mine):.4f} | {first - seconds:.1f} |"
            )


def our_distances(logits_fn: LogitsFn, images: jax.Array, labels: np.ndarray, norm: str) -> Runs:
    """Returns the minimum-norm attacks of this norm, compiled."""
    chosen = {"fmn": attacks.fmn} | ({"ddn": attacks.ddn} if norm == "l2" else {})

    def distances(attack: Callable) -> np.ndarray:
        return np.asarray(attack(images, jnp.asarray(labels)).distance)

    return {
        name: partial(
            distances, jax.jit(partial(attack, logits_fn, None, threat=ThreatModel(1.0, norm), n_iter=STEPS))
        )
        for name, attack in chosen.items()
    }


def their_distances(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, norm: str) -> dict[str, Runs]:
    """Returns the same attacks of foolbox, with as many steps."""
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))

    def distances(attack: Any) -> np.ndarray:
        shown = attack(wrapped, x, y, epsilons=None)[1]
        length = (shown - x).flatten(1).norm(float("inf") if norm == "linf" else 2, dim=1)
        fooled = (model(shown).argmax(1) != y).numpy()
        return np.where(fooled, length.numpy(), np.inf)

    if norm == "linf":
        return {"fmn": {"foolbox": partial(distances, foolbox.attacks.LInfFMNAttack(steps=STEPS))}}
    return {
        "fmn": {
            "foolbox": partial(distances, foolbox.attacks.L2FMNAttack(steps=STEPS)),
            "foolbox, projected": partial(distances, ProjectedFMN(steps=STEPS)),
        },
        "ddn": {"foolbox": partial(distances, foolbox.attacks.DDNAttack(steps=STEPS))},
    }


class ProjectedFMN(foolbox.attacks.L2FMNAttack):
    """FMN of foolbox with the paper's projection; that of foolbox 3.3.4 divides norms by themselves."""

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        """Moves candidates into the L2 ball of each image's radius."""
        return x0 + clip_lp_norms(x - x0, norm=epsilon, p=2)


def our_attacks(logits_fn: LogitsFn, images: jax.Array, labels: np.ndarray, threat: ThreatModel) -> Runs:
    """Returns PGD, FGSM and each attack of AutoAttack alone, compiled."""
    key, clean = jax.random.key(0), np.asarray(logits_fn(images)).argmax(-1)
    pgd = partial(attacks.pgd, logits_fn, key, threat=threat, steps=20, step_size=threat.epsilon / 8)
    alone = {
        "fgsm": jax.jit(
            lambda x, y: attacks.pgd(
                logits_fn, key, x, y, threat=threat, steps=1, step_size=threat.epsilon,
                start=clean_start,
            )
        ),
        "pgd_20": jax.jit(pgd),
    }  # fmt: skip

    def simple(attack: Callable) -> np.ndarray:
        shown = attack(images, jnp.asarray(labels))
        return (np.asarray(logits_fn(shown)).argmax(-1) == labels) & (clean == labels)

    runs: Runs = {name: partial(simple, attack) for name, attack in alone.items()}
    names = ("apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")
    stages = [stage for name in names for stage in autoattack.stages(name, 10, threat=threat)]
    return runs | our_stages(logits_fn, images, labels, stages)


def our_stages(
    logits_fn: LogitsFn, images: jax.Array, labels: np.ndarray, stages: Sequence[autoattack.Stage]
) -> Runs:
    """Returns each of these stages alone, compiled."""
    clean = np.asarray(logits_fn(images)).argmax(-1)

    def staged(stage: autoattack.Stage, step: Callable) -> np.ndarray:
        keys, progress = jax.random.split(jax.random.key(0), len(labels)), autoattack.begin(labels, clean)

        def attack(ids: np.ndarray, number: int) -> Any:
            batch = np.resize(ids, len(labels))
            shown = step(keys[batch], images[batch], jnp.asarray(labels[batch]), jnp.int32(number))
            called = np.asarray(logits_fn(shown)).argmax(-1)
            return np.asarray(shown)[: len(ids)], called[: len(ids)]

        for _ in autoattack.run(stage, attack, labels, progress, size=len(labels)):
            pass
        return progress.broken_in == autoattack.ROBUST

    return {stage.name: partial(staged, stage, jax.jit(partial(stage.attack, logits_fn))) for stage in stages}


def by_torchattacks(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel, attack: Any
) -> Callable[[], np.ndarray]:
    """Returns an attack of torchattacks on the images that are classified correctly."""
    right, order = model(x).argmax(1) == y, float("inf") if threat.norm == "linf" else 2

    def run() -> np.ndarray:
        shown, result = attack(x[right], y[right]), right.clone()
        far = (shown - x[right]).flatten(1).norm(order, dim=1) > threat.epsilon * (1 + 1e-5)
        result[right] = (model(shown).argmax(1) == y[right]) | far
        return result.numpy()

    return run


def their_ensemble(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel
) -> dict[str, Runs]:
    """Returns each attack of torchattacks' AutoAttack alone, with that package's settings."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    whole = torchattacks.AutoAttack(model, norm=norm, eps=threat.epsilon, n_classes=10, seed=0)
    each = dict(zip(autoattack.VERSIONS["torchattacks"], whole._autoattack.attacks, strict=True))
    return {name: {"torchattacks": by_torchattacks(model, x, y, threat, one)} for name, one in each.items()}


def their_attacks(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel
) -> dict[str, Runs]:
    """Returns the same attacks of both peers, with the constants of AutoAttack."""
    norm, eps = {"linf": "Linf", "l2": "L2"}[threat.norm], threat.epsilon
    right = (model(x).argmax(1) == y).numpy()

    def robust(shown: torch.Tensor) -> np.ndarray:
        return (model(shown).argmax(1) == y).numpy() & right

    torchattack = partial(by_torchattacks, model, x, y, threat)

    def fool(attack: Any) -> Callable[[], np.ndarray]:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        return lambda: robust(attack(wrapped, x, y, epsilons=eps)[1])

    pgd = {"abs_stepsize": eps / 8, "steps": 20}
    boxes = {
        "linf": (foolbox.attacks.LinfFastGradientAttack, foolbox.attacks.LinfPGD),
        "l2": (foolbox.attacks.L2FastGradientAttack, foolbox.attacks.L2PGD),
    }[threat.norm]
    torch_pgd = (
        torchattacks.PGD(model, eps=eps, alpha=eps / 8, steps=20)
        if norm == "Linf"
        else torchattacks.PGDL2(model, eps=eps, alpha=eps / 8, steps=20)
    )
    apgd = partial(torchattacks.APGD, model, norm=norm, eps=eps, steps=STEPS)
    return {
        "fgsm": {"foolbox": fool(boxes[0](random_start=False))},
        "pgd_20": {"foolbox": fool(boxes[1](**pgd)), "torchattacks": torchattack(torch_pgd)},
        "apgd_ce": {"torchattacks": torchattack(apgd(loss="ce"))},
        "apgd_dlr": {"torchattacks": torchattack(apgd(loss="dlr"))},
        "apgd_t": {
            "torchattacks": torchattack(
                torchattacks.APGDT(model, norm=norm, eps=eps, steps=STEPS, n_classes=10)
            )
        },
        "fab_t": {
            "torchattacks": torchattack(
                torchattacks.FAB(model, norm=norm, eps=eps, steps=STEPS, multi_targeted=True, n_classes=10)
            )
        },
        "square": {
            "torchattacks": torchattack(
                torchattacks.Square(model, norm=norm, eps=eps, n_queries=5000, resc_schedule=False)
            )
        },
    }


if __name__ == "__main__":
    cli.run(main)
