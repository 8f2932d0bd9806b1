"""The card of a model: its config, its figures, and images on which anyone can check it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robal_jax.reporting.names import BY_CLASS, display_name, radius, threat
from robal_jax.reporting.results import EVERYTHING, FLAGGED, Results, outcome_of
from robal_jax.storage.checkpoints import digest

NO_AUTHORS, NO_LICENSE = "N/A", "not stated"
"""Texts of a card whose authors or licence neither the user nor an earlier card states."""

DATA_LICENSES = {
    "digits_lt": "scikit-learn's copy of the UCI digits (Alpaydin and Kaynak, 1998), CC BY 4.0",
    "cifar10_lt": "CIFAR-10 (Krizhevsky, 2009), which has no licence of its own; no image is included",
    "cifar100_lt": "CIFAR-100 (Krizhevsky, 2009), which has no licence of its own; no image is included",
}
"""Source and licence of the images that a model was trained on, by ``config.data.name``."""

EMPTIED = ("data.path", "evaluation.audit.surrogate")
"""Fields of a config that only its user can know."""

SETTINGS = (
    "n", "part", "norm", "epsilon", "class_epsilon", "budget", "step_size", "start", "head", "logit_scale",
    "prior_adjustment", "evaluation_seed", "precision", "autoattack", "stages", "test_set_sha256", "versions",
    "commit", "device", "processor", "date", "seconds",
)  # fmt: skip
"""Entries of an evaluation's ``meta`` that a card repeats."""

CHECKED = 64
COARSE = 4  # numbers per side from which an image of the check is interpolated


def without_paths(fields: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Returns a config without what others lack: of each absolute path or URL the last part, or ''.

    In place of an ensemble with attacks of the user's own it has AutoAttack.

    Example:
      >>> without_paths({"data": {"path": "/x/cifar10.npz", "name": "a"}, "teacher": "/runs/at"})
      {'data': {'path': '', 'name': 'a'}, 'teacher': 'at'}
    """

    def cleaned(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_paths(value, f"{name}.")
        if name in EMPTIED:
            return ""
        if name == "evaluation.autoattack" and ":" in str(value):
            return "standard"
        if isinstance(value, str) and (value.startswith(("/", "~")) or "://" in value):
            return value.rstrip("/").rpartition("/")[2]
        return value

    return {key: cleaned(f"{place}{key}", value) for key, value in fields.items()}


def figures(results: Results) -> dict[str, Any]:
    """Returns what a card says of one evaluation: its settings, its figures and the audit's outcomes.

    Each FIGURE is {'value', 'low', 'high'}, a share in [0, 1] with its 95 % interval; 'per_class' has lists
    of them, ``[K]``, in the order of the classes.
    """
    summary, audit = results.summary, results.audit
    shown = ("accuracy", *summary["groups"], "boundary_error")
    conditions = {
        name: {
            **{each: found[each] for each in shown if each in found},
            "per_class": {
                bound: [recall[bound] for recall in found["per_class"]["recall"]]
                for bound in ("value", "low", "high")
            },
        }
        for name, found in results.conditions.items()
    }
    return {
        **{name: results.meta[name] for name in SETTINGS if results.meta.get(name) is not None},
        "groups": summary["groups"],
        "conditions": conditions,
        "audit": audit
        and {
            "examples": audit["examples"],
            "outcomes": {verdict["name"]: outcome_of(verdict) for verdict in audit["verdicts"]},
        },
    }


def in_order(
    evaluations: Mapping[str, dict[str, Any]], fields: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns the evaluations of a card, as :func:`figures` has them, that of the highest rank first."""

    def its_rank(item: tuple[str, dict[str, Any]]) -> tuple[bool, bool, bool, int]:
        return rank(item[1], item[1]["conditions"], fields)

    return dict(sorted(evaluations.items(), key=its_rank, reverse=True))


def leading(evaluations: Sequence[Results]) -> Results:
    """Returns the evaluation that counts, that of the highest :func:`rank`."""
    return max(evaluations, key=lambda one: rank(one.meta, one.conditions, one.meta.get("config", {})))


def rank(
    meta: Mapping[str, Any], conditions: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[bool, bool, bool, int]:
    """Ranks an evaluation of a model; a higher rank counts more.

    The highest is one at a single radius, at that of the training, with AutoAttack, and of the most images,
    in this order of importance.

    Args:
      meta: settings of the evaluation, as in its results or in a card.
      conditions: its figures by attack.
      fields: of the config of the model.

    Example:
      >>> rank({"n": 9, "epsilon": 0.1}, {"autoattack": {}}, {"threat": {"epsilon": 0.2}})
      (True, False, True, 9)
    """
    trained = fields.get("threat", {}).get("epsilon")
    at_trained = trained is None or meta.get("epsilon") == trained
    return "class_epsilon" not in meta, at_trained, "autoattack" in conditions, meta["n"]


def robustbench(results: Results, architecture: str, authors: str = NO_AUTHORS) -> dict[str, Any]:
    """Returns the figures of an evaluation in the form of RobustBench's ``model_info``, texts in percent.

    RobustBench has no field for the number of images, for a long tail or for another attack than AutoAttack,
    so the footnote says them.
    'autoattack_acc' is that of the whole AutoAttack, and missing without it; 'reported' is that of the
    strongest attack that was made.

    Source: Croce et al. (NeurIPS Datasets and Benchmarks 2021) and the files of their repository.
    """
    meta, conditions = results.meta, results.conditions

    def percent(condition: str) -> str:
        return f"{100 * conditions[condition]['accuracy']['value']:.2f}"

    verdicts = (results.audit or {}).get("verdicts", [])
    images = meta.get("part") or f"all {meta['n']} test images"
    attack = results.headline_attack
    long_tail = len(set(results.summary["class_counts"])) > 1
    notes = [
        *([f"trained on a long tail: {meta['imbalance']}"] if long_tail else []),
        f"evaluated on {images}",
        f"reported under {display_name(attack)} at {threat(meta)}",
        *([BY_CLASS] if "class_epsilon" in meta else []),
        *_generated(meta),
    ]
    footnote = "; ".join(notes)
    return {
        "link": "N/A",
        "name": f"{meta['method']} (robal_jax)",
        "authors": authors,
        "additional_data": bool(meta.get("generated")),
        "number_forward_passes": 1,
        "dataset": meta["dataset"],
        "venue": "N/A",
        "architecture": architecture,
        "eps": radius(meta["epsilon"]),
        "clean_acc": percent("clean"),
        "reported": percent(attack),
        **({"autoattack_acc": percent("autoattack")} if "autoattack" in conditions else {}),
        "unreliable": any(
            outcome_of(verdict) == FLAGGED and verdict.get("doubts") == EVERYTHING for verdict in verdicts
        ),
        "footnote": f"{footnote[0].upper()}{footnote[1:]}.",
    }


def _generated(meta: Mapping[str, Any]) -> list[str]:
    return [str(meta["generated"])] if meta.get("generated") else []


def check_images(shape: Sequence[int], pixel_max: int) -> np.ndarray:
    """Makes the images of a card's check: smooth noise of many contrasts, the same on every machine.

    A coarse grid of random numbers is interpolated linearly, ``A x A^T`` per channel.

    Args:
      shape: of an image, ``(H, W, C)``.
      pixel_max: the largest pixel, 1..255.

    Returns:
      Integers in ``0..pixel_max``, uint8 ``[64, H, W, C]``.

    Example:
      >>> images = check_images((8, 8, 1), 16)
      >>> print(images.shape, images.min(), images.max(), images[5, 3, :, 0])
      (64, 8, 8, 1) 0 16 [15 14 14 14 14 14 13 12]
    """
    # The stream of RandomState is the same in every version of NumPy (NEP 19).
    draw = np.random.RandomState(0).random_sample
    coarse = draw((CHECKED, COARSE, COARSE, shape[2]))
    contrast, brightness = draw((2, CHECKED, 1, 1, 1))
    rows, columns = (_interpolation(side) for side in shape[:2])
    smooth = np.einsum("hi,nijc,wj->nhwc", rows, coarse, columns)
    levels = brightness + 4 * contrast * (smooth - 0.5)
    return np.round(pixel_max * np.clip(levels, 0, 1)).astype(np.uint8)


def _interpolation(side: int) -> np.ndarray:
    """Returns the weights of linear interpolation from ``COARSE`` points to ``side``, ``[side, COARSE]``."""
    distance = np.abs(np.linspace(0, COARSE - 1, side)[:, None] - np.arange(COARSE))
    return np.maximum(0, 1 - distance)


def tolerance(weights: Mapping[str, np.ndarray], logits: np.ndarray) -> float:
    """Bounds by how much float32 may change logits if a machine adds in another order.

    ``4 u max|z| sum_l sqrt(n_l)`` with ``u = 2^-24``: a sum of ``n`` products in any order is wrong by more
    than ``4 sqrt(n) u`` of its size with a probability below ``10^-3``, and to first order the errors of
    the layers ``l`` add up, if no layer makes a relative error larger.

    Args:
      weights: arrays by PyTorch name; ``n_l`` is the number of inputs of each matrix or convolution.
      logits: ``z [n, K]``.

    Returns:
      The bound; two machines may differ by twice as much.

    Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SISC 41 (2019).

    Example:
      >>> print(tolerance({"fc.weight": np.zeros((10, 64))}, np.array([[3.0, -5.0]])) * 2**24)
      160.0
    """
    inputs = [array[0].size for array in weights.values() if array.ndim >= 2]
    return float(4 * 2.0**-24 * np.abs(logits).max() * np.sqrt(inputs).sum())


def check_of(images: np.ndarray, logits: np.ndarray, bound: float) -> dict[str, Any]:
    """Returns the entry ``check`` of a card.

    Args:
      images: :func:`check_images`.
      logits: of the model, float32 ``[64, K]``.
      bound: :func:`tolerance`.
    """
    return {
        "images": "robal_jax.zoo.cards.check_images of the image's shape and pixel_max",
        "images_sha256": digest({"images": images}),
        "tolerance": 2 * bound,
        "predictions": logits.argmax(axis=1).tolist(),
        "logits": [[float(str(logit)) for logit in row] for row in logits],  # the shortest decimals
    }


def sure(check: Mapping[str, Any]) -> np.ndarray:
    """Returns which of the check's predictions rounding cannot change, ``[64]``.

    Their margin, the largest logit minus the second, exceeds what both of them may change.

    Example:
      >>> sure({"logits": [[2.0, 1.0, 0.0], [2.0, 1.9, 0.0]], "tolerance": 0.1})
      array([ True, False])
    """
    second, first = np.sort(np.asarray(check["logits"]), axis=1).T[-2:]
    return first - second > 2 * check["tolerance"]
