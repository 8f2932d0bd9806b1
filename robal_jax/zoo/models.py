"""Models of the zoo by name: as functions from images to logits, and as runs for an evaluation."""

import dataclasses
import difflib
import hashlib
import json
import pathlib
import re
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from robal_jax import builder, cli, exchange, pytorch
from robal_jax.averages import Weights
from robal_jax.data import TestSet
from robal_jax.devices import hosts
from robal_jax.errors import InputError, one_line, shown, user_path
from robal_jax.evaluation import Run
from robal_jax.storage.config_file import flatten, to_json, with_neutral
from robal_jax.storage.lock import alone_in
from robal_jax.storage.names import CONFIG
from robal_jax.zoo.cards import check_images

FOLDER = cli.SHIPPED / "experiments" / "zoo"

WEIGHTS, CARD, ROBUSTBENCH = ENDINGS = (".safetensors", ".json", ".robustbench.json")
"""Endings of the three files of a model."""

LONGEST = 1000  # characters of a name or path
PATIENCE = 60.0  # seconds to wait for another job that makes the same run

NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""Form of the name of a model, DATA/NAME."""

NEEDED = {
    "name": str, "config": dict, "weights_sha256": str, "data": dict, "checkpoint": dict, "network": str,
    "check": dict,
}  # fmt: skip
"""Entries of a card without which a model cannot be loaded, and their types."""


@dataclasses.dataclass(frozen=True)
class Model(Run):
    """A model of the zoo, with all that a :class:`Run` has.

    ``checkpoint`` is the file of the weights, ``sha256`` that of the file, and ``test`` has no images,
    because no data set is needed.

    Attributes:
      card: what is known of the model: figures, config, data, licence.
    """

    card: dict[str, Any]

    def check(self) -> float:
        """Computes the logits of the card's 64 images, and compares them with those in the card.

        Returns:
          The largest difference.

        Raises:
          InputError: it is larger than rounding explains.
        """
        stored = self.card["check"]
        images = check_images(self.test.images.shape[1:], self.test.pixel_max)
        found = float(np.abs(self.logits(images) - np.array(stored["logits"])).max())
        if not found <= stored["tolerance"]:
            raise InputError(
                f"{self.card['name']} does not compute what its card says: logits differ by {found:.2g}, "
                f"but rounding explains {stored['tolerance']:.2g}; compute in full float32"
            )
        return found


def names() -> list[str]:
    """Lists the models of the zoo.

    Example:
      >>> [name for name in names() if name.startswith("digits")]
      ['digits_lt/at_small_cnn', 'digits_lt/robal_n_small_cnn']
    """
    files = FOLDER.glob(f"*/*{WEIGHTS}")
    return sorted(f"{file.parent.name}/{file.name.removesuffix(WEIGHTS)}" for file in files)


def load_model(name: str | pathlib.Path, *, trust_code: bool = False) -> Model:
    """Loads a model of the zoo, or from files elsewhere; no data set is needed.

    Logits are in the order of ``test.class_names``, which is that of the class counts, not always that of the
    data set's labels.

    Args:
      name: of the model, such as 'digits_lt/at_small_cnn', see :func:`names`; or the path of its weights or
        of its card.
      trust_code: a card may name functions of its author's, ``module:function``, which are then imported and
        called; without it such a card is refused, so that no file can run code.

    Returns:
      The model, at its logit scale and with its prior adjustment, like a run that :func:`load_run` loads.

    Raises:
      InputError: there is no such model, or a file of it is damaged.

    Example:
      >>> model = load_model("digits_lt/robal_n_small_cnn")
      >>> print(model.logits(np.zeros((2, 8, 8, 1), np.float32)).shape, model.test.class_counts)
      (2, 10) [104  74  53  38  27  19  14  10   7   5]
      >>> model.check() <= model.card["check"]["tolerance"]
      True
    """
    stem = _stem(name)
    card, weights = read_card(name), stem.with_name(f"{stem.name}{WEIGHTS}")
    try:
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {weights} ({error.strerror}); restore it beside its card") from error
    if sha256 != card["weights_sha256"]:
        raise InputError(
            f"{weights} is not what its card describes (sha256 {sha256[:12]}…, and the card says "
            f"{card['weights_sha256'][:12]}…); restore both files"
        )
    config = config_of(card, trust_code=trust_code)
    test, trained = _test_set(card["data"])
    job = builder.evaluation_on(config, test, np.arange(0), trained)
    state_dict = pytorch.read_weights(weights)
    (params, stats), _, _ = exchange.converted(config, state_dict, Weights(**job.variables))
    fields = json.loads(to_json(config))
    return Model(params, stats, fields, weights, sha256, test, job.predict, card)


def read_card(name: str | pathlib.Path) -> dict[str, Any]:
    """Reads the card of a model, see :func:`load_model`.

    Raises:
      InputError: there is no such model, or its card is damaged.
    """
    stem = _stem(name)
    path = stem.with_name(f"{stem.name}{CARD}")
    try:
        card = json.loads(path.read_bytes())
        _check_card(card)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise InputError(f"cannot read the card {path} ({one_line(error)}); restore it") from error
    return card


def _check_card(card: dict[str, Any]) -> None:
    """Raises an error of Python's, such as ValueError, if an entry is missing or of a wrong kind."""
    for entry, kind in NEEDED.items():
        if entry not in card:
            raise ValueError(f"it has no {entry}")
        if not isinstance(card[entry], kind):
            raise ValueError(f"its entry {entry!r} is {shown(card[entry])}")
    if not re.fullmatch(NAME, card["name"]):
        raise ValueError(f"its name is {card['name']!r}")
    test, trained = _test_set(card["data"])
    logits = np.array(card["check"]["logits"], float)
    sizes = {len(test.class_counts), len(test.class_names), logits.shape[-1]}
    if len(sizes | ({len(trained)} if trained is not None else set())) > 1:
        raise ValueError("its numbers of classes, counts and logits differ")
    if test.class_counts.min() < 1 or not 1 <= test.pixel_max <= 255 or len(test.images.shape) != 4:
        raise ValueError("its class counts, pixel_max or shape of an image cannot be")
    for section, entry in (("data", "sha256"), ("checkpoint", "weights"), ("check", "tolerance")):
        if card[section].get(entry) is None:
            raise ValueError(f"its entry {section!r} has no {entry}")


def config_of(card: dict[str, Any], *, trust_code: bool = False) -> ConfigDict:
    """Returns the config in a card; fields that were added since get their neutral values.

    Args:
      card: of a model.
      trust_code: see :func:`load_model`.

    Raises:
      InputError: it cannot be used, or it names functions that are not the library's.
    """
    # Names of functions to import have a colon, and nothing else that the library writes into a config.
    foreign = [
        f"config.{field} is {shown(value)}"
        for field, value in flatten(card["config"]).items()
        if field != "method" and ":" in str(value)
    ]
    if foreign and not trust_code:
        raise InputError(
            f"the card of {card['name']} names code to run: {foreign[0]}; if you trust its author, load "
            "it with load_model(..., trust_code=True)"
        )
    try:
        config = ConfigDict(with_neutral(card["config"])).lock()
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the config in a card is damaged ({one_line(error)}); restore it") from error
    builder.validate(config)
    return config


def make_run(name: str | pathlib.Path, workdir: pathlib.Path) -> None:
    """Makes the folder of a run of a model, which is evaluated like one trained here; or finds it made.

    All processes of a job call it together.

    Raises:
      InputError: there is no such model, a file of it is damaged, or the folder holds something else.
    """
    model = load_model(name)
    card, data, checkpoint = model.card, model.card["data"], model.card["checkpoint"]
    origin = {
        "weights": f"model {card['name']} of the zoo",
        "weights_sha256": model.sha256,
        "network": card["network"],
        "data_sha256": data["sha256"],
        **({"class_counts": data["trained_counts"]} if "trained_counts" in data else {}),
        **{key: checkpoint[key] for key in ("selection", "selected_on_test") if key in checkpoint},
    }
    if hosts.by_first(partial(exchange.is_there, workdir, model.sha256)):
        return
    weights, averaged = Weights(model.params, model.stats), checkpoint["weights"] == "average"
    with hosts.held_by_first(partial(alone_in, workdir, PATIENCE)):  # another evaluation may make it, too
        if not hosts.by_first(partial(exchange.is_there, workdir, model.sha256)):
            exchange.write_run(config_of(card), weights, workdir, origin, averaged=averaged)


def _stem(name: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a model's files without their endings.

    Raises:
      InputError: there is no such model.
    """
    text = str(name)
    known = names()
    if text in known:
        return FOLDER / text
    path = user_path(text)
    for ending in reversed(ENDINGS):
        if path.name.endswith(ending):
            path = path.with_name(path.name.removesuffix(ending))
            break
    if len(text) > LONGEST:
        raise InputError(f"the name of a model has {len(text)} characters; use {_one_of(known)}")
    if path.name and any(path.with_name(f"{path.name}{ending}").is_file() for ending in (WEIGHTS, CARD)):
        return path
    if (path / CONFIG).is_file():
        raise InputError(f"{path} is a run, not a model of the zoo; load it with robal_jax.load_run")
    near = difflib.get_close_matches(text, known, 3, cutoff=0.4)
    raise InputError(f"no model {text!r} in the zoo, and no such files; use {_one_of(near or known)}")


def _one_of(known: list[str]) -> str:
    if not known:
        return "the path of a card"
    return known[0] if len(known) == 1 else f"one of {', '.join(known)}"


def _test_set(data: dict[str, Any]) -> tuple[TestSet, np.ndarray | None]:
    """Returns a test set without images, and the class counts of a mixture with generated images."""
    images = np.zeros((0, *map(int, data["images"])), np.uint8)
    counts, labels = np.array(data["class_counts"], np.int64), np.zeros(0, np.int32)
    trained = np.array(data["trained_counts"], float) if "trained_counts" in data else None
    return TestSet(images, labels, int(data["pixel_max"]), counts, tuple(data["classes"])), trained
