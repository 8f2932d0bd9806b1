"""All numbers of an evaluation: one record, one writer and one reader of ``results.json``."""

import contextlib
import csv
import dataclasses
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robal_jax import metrics
from robal_jax.errors import UNREACHABLE, InputError, one_line
from robal_jax.reporting import names
from robal_jax.storage import buckets
from robal_jax.storage.files import write_whole
from robal_jax.storage.names import (
    ADVERSARIAL,
    AUDIT,
    BEST,
    CHECKPOINTS,
    EVALUATION,
    EXAMPLES,
    PER_CLASS,
    RESULTS,
    UNFINISHED,
)

_DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError, zipfile.BadZipFile
)  # fmt: skip
"""Errors of reading a damaged JSON or .npz file."""

FIXED_STEPS, EVERYTHING, CHOICE = "fixed steps", "everything", "choice of the checkpoint"
OWN_GRADIENT = "own gradient"
"""What a check of the audit casts doubt on: the accuracies under FGSM, PGD and MIM; all of them; or, because
the checkpoint was chosen on the test images, that they hold for new images; or all but those with BPDA."""

WITHOUT_RESULTS = (CHECKPOINTS, BEST, UNFINISHED, ADVERSARIAL)
"""Names of the folders and files of a run in which no comparison looks."""

MANY_CLASSES = 20
"""With more classes a report names some of them only."""
PASSED, NOTE, FLAGGED, TOO_FEW, NOT_RUN = OUTCOMES = (
    "passed",
    "note",
    "flagged",
    "too few images",
    "not run",
)
"""Outcomes of a check.

Nothing was found; a number is optimistic; there is a sign of masking, or the evaluation cannot be trusted;
the sample is too small to show anything; the check was not run.
"""


def outcome_of(verdict: Mapping[str, Any]) -> str:
    """Returns the outcome of a check of ``results.json``; older files say whether it was flagged.

    Example:
      >>> outcome_of({"outcome": "note"}), outcome_of({"flagged": True}), outcome_of({"flagged": None})
      ('note', 'flagged', 'not run')
    """
    if "outcome" in verdict:
        return str(verdict["outcome"])
    return {True: FLAGGED, False: PASSED, None: NOT_RUN}[verdict["flagged"]]


@dataclasses.dataclass(frozen=True)
class Results:
    """All numbers of an evaluation, as ``results.json`` holds them; every value is ready for JSON.

    Attributes:
      meta: what was evaluated and how. 'method', 'dataset' and 'main_attack' are needed; the report prints
        unknown keys too.

        - the model: 'method', 'seed' (of its training), 'head', 'logit_scale', 'prior_adjustment',
          'precision' (of matrix products), 'checkpoint', 'checkpoint_sha256', 'code_sha256' (of the user's
          own modules, by name; missing without), 'code' (which of them changed since the training, for
          people; missing if none), 'origin' (of imported weights, for people), 'config' (all fields, nested),
          'identity' (what tells an evaluation without a config from others), 'training' ({'epoch': numbers,
          name of a metric: its means}, up to the checkpoint), 'selection' (how the checkpoint was chosen, for
          people), 'selected_on_test' (True, if it was chosen on test images), 'held_out' (how many training
          images were held out, for people), 'judged' (accuracies on held-out or test images during the whole
          training, see :func:`storage.progress.judged_course`);
        - the images: 'dataset', 'imbalance', 'class_names' (list of K), 'n', 'test_set_sha256', 'part' (which
          part of the test set; missing for all of it), 'generated' (their share in training; missing
          without);
        - the attacks: 'norm', 'epsilon', 'class_epsilon' (radii by class [K], and 'epsilon' is the common one
          that they are made of; missing if all are equal), 'budget' (the rule of these radii),
          'common_epsilon' (the evaluation of the same weights at the common radius, if there is one:
          'folder', and 'accuracy' and 'tail', {condition: FIGURE}), 'step_size', 'start', 'evaluation_seed',
          'main_attack' (the one that counts if no ensemble was evaluated), 'autoattack' (names of the
          ensemble's attacks), 'stages' ({attack: accuracy after it and all attacks before it});
        - the evaluation: 'versions' ({package: version}), 'commit' (of the checkout), 'device', 'processor',
          'date', 'seconds', 'command'.
      summary: what :func:`metrics.summarize` returns; with 'corruptions', what
        :func:`metrics.summarize_corruptions` returns, if images were corrupted; with 'certified', if bounds
        were computed: 'factors' (parts of the radius), 'by_factor' (for each, FIGUREs 'accuracy' and one per
        group), and 'broken' (certified images that are misclassified); with 'optimality', if the attacks
        were compared: 'factors' (parts of the radius), 'examples' (number of images), 'attacks' (by name
        'optimality', a number or None if it is not defined, and 'robust', a FIGURE per part), and 'best'
        (a FIGURE per part, under the best attack on each image).
      audit: whether the attacks can be trusted; None without an audit. 'examples', the number of images in
        its sample; 'verdicts', a list of {'name', 'title', 'outcome' (see :func:`outcome_of`),
        'doubts' (``FIXED_STEPS``, ``EVERYTHING``, ...), 'statement', 'evidence' (a dict),
        'meaning' ({'raised', 'means', 'do'}, sentences on the check)}, of which older files lack 'doubts' and
        'meaning'; 'curves', any of 'scale', 'steps', 'restarts' and 'epsilon' (x: radii), each
        {'x': m numbers, 'series': {name: m FIGUREs}}.
      norms: None if the features are not known. 'features', the mean norm of each class's features, [K];
        'weights', the norm of each class's weight vector, [K], or None if the head has no such vectors.
      distances: of the closest adversarial images; None if they were not asked for. 'attack', 'found' (number
        of images with one), 'missed' (of these, number that is within the threat model's own radius and right
        under all other attacks; older files lack it), 'median', as :func:`distances.median_distances` returns
        it with None for infinity, and 'curve', the robust accuracy by radius, in the form of the audit's
        curves.
    """

    meta: Mapping[str, Any]
    summary: Mapping[str, Any]
    audit: Mapping[str, Any] | None = None
    norms: Mapping[str, Any] | None = None
    distances: Mapping[str, Any] | None = None

    @property
    def conditions(self) -> Mapping[str, Any]:
        """The figures of each condition: 'clean' first, 'worst' last."""
        return self.summary["conditions"]

    @property
    def title(self) -> str:
        """The model, the data set, the part of it and budgets by class in a few words."""
        part = f" ({self.meta['part']})" if "part" in self.meta else ""
        by_class = " (budgets by class)" if "class_epsilon" in self.meta else ""
        return f"{self.meta['method']} on {self.meta['dataset']}{part}{by_class}"

    @property
    def headline_attack(self) -> str:
        """The condition whose accuracy counts as the robust accuracy, see :func:`names.headline_attack`."""
        return names.headline_attack(self.conditions, self.meta["main_attack"])

    @property
    def headline(self) -> list[str]:
        """The conditions to see at a glance."""
        return names.headline(self.conditions, self.meta["main_attack"])

    @property
    def groups(self) -> Mapping[str, Any]:
        """The classes by group, from head to tail; empty if all are in one group."""
        groups = self.summary["groups"]
        return groups if len(groups) > 1 else {}

    @property
    def rarest(self) -> str:
        """The group of the classes with the fewest training images; '' if there is none but the middle."""
        return next((name for name in list(self.groups)[-1:] if name != "medium"), "")

    def __repr__(self) -> str:
        shares = {name: row["accuracy"]["value"] for name, row in self.conditions.items()}
        shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        return f"<{self.title}: {shown}; flagged: {', '.join(self.flagged) or 'nothing'}>"

    @property
    def flagged(self) -> list[str]:
        """The titles of the audit's flagged checks; empty without an audit, too."""
        verdicts = self.audit["verdicts"] if self.audit else []
        return [verdict["title"] for verdict in verdicts if outcome_of(verdict) == FLAGGED]

    @property
    def protocols(self) -> Mapping[str, Any]:
        """The groups of several protocols side by side, see :func:`metrics.summarize`; empty without them."""
        return self.summary.get("protocols", {})

    @property
    def corruptions(self) -> Mapping[str, Any]:
        """Accuracies on corrupted images, see :func:`metrics.summarize_corruptions`; empty without them."""
        return self.summary.get("corruptions", {})

    @property
    def certified(self) -> Mapping[str, Any]:
        """Certified accuracies, see ``summary``; empty without them."""
        return self.summary.get("certified", {})

    @property
    def optimality(self) -> Mapping[str, Any]:
        """How the attacks compare, see ``summary``; empty without it."""
        return self.summary.get("optimality", {})

    @property
    def training(self) -> Mapping[str, Any]:
        """The course of the training by epoch, see ``meta``; empty if it is not known."""
        return self.meta.get("training") or {}

    @property
    def judged(self) -> Mapping[str, Any]:
        """Accuracies on held-out or test images during the training, see ``meta``; empty without them."""
        return self.meta.get("judged") or {}

    @property
    def curves(self) -> Mapping[str, Any]:
        """The curves of the audit; empty if there is none."""
        return (self.audit or {}).get("curves", {})

    def class_name(self, index: int) -> str:
        """Returns the name of a class, or its index if classes have no names."""
        return str(self.meta["class_names"][index]) if self.meta.get("class_names") else str(index)

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes ``results.json``, and ``per_class.csv`` with a row per class and condition.

        Raises:
          OSError: the folder cannot be written to.
        """
        content = {"meta": self.meta, "summary": self.summary, "audit": self.audit, "norms": self.norms}
        content |= {"distances": self.distances} if self.distances else {}
        texts = {RESULTS: json_text(content), PER_CLASS: _per_class_csv(self)}
        for name, text in texts.items():
            write_whole(folder / name, text.encode(errors="backslashreplace"))
        return [folder / name for name in texts]

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Results":
        """Reads ``results.json``.

        Raises:
          InputError: the file is missing or damaged.
        """
        with _reading(folder / RESULTS):
            content = json.loads((folder / RESULTS).read_text())
            parts = (content.get(name) for name in ("audit", "norms", "distances"))
            results = Results(content["meta"], content["summary"], *parts)
            _ = results.title, results.headline, results.groups  # missing fields fail here
        return results


class Gallery(NamedTuple):
    """Images under an attack.

    Attributes:
      images: ``[m, H, W, 1 or 3]`` in [0, 1], m >= 1.
      adversarial: the same images after the attack.
      labels: ``[m]``.
      predictions: the classes of the adversarial images, ``[m]``.
      condition: the attack.
    """

    images: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    condition: str

    @property
    def magnification(self) -> int:
        """The largest whole factor by which all changes fit into the range of grey, at least 1."""
        change = np.abs(np.asarray(self.adversarial, np.float64) - np.asarray(self.images)).max()
        return max(1, int(0.5 / change + 1e-3)) if change > 0 else 1  # float32 may make 0.1 a little more


Outcomes = dict[str, dict[str, np.ndarray]]
"""Name of a condition to its fields, each ``[n]``: ``pred``, ``distance`` and more."""


def to_arrays(outcomes: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns outcomes as a file holds them, by ``field_condition``: 'pred_pgd_20'."""
    return {
        f"{field}_{condition}": values
        for condition, fields in outcomes.items()
        for field, values in fields.items()
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Outcomes:
    """Returns what :func:`to_arrays` was given; other arrays of the file ('labels', 'ids') are left out."""
    outcomes: Outcomes = {}
    for name, values in arrays.items():
        field, _, condition = name.partition("_")  # no field has an underscore
        if condition:
            outcomes.setdefault(condition, {})[field] = values
    return outcomes


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class EvaluatedRun(Results):
    """The results of an evaluation, with the outcome of every image.

    Attributes:
      name: its folder.
      examples: content of ``examples.npz``: 'labels' ``[n]``, 'ids' ``[n]`` of the test images, and
        :func:`to_arrays` of the outcomes.
      sample: content of ``audit.npz``: 'ids' ``[m]`` of the audit's images, and for each of its curves which
        of them are right when clean and at each of its points, bool ``[m, L]``. Empty without an audit, in
        older evaluations, and if the file is damaged: no other figure depends on it.
    """

    name: str
    examples: Mapping[str, np.ndarray]
    sample: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """Predicted classes ``[n]`` by condition, 'worst' last."""
        outcomes = from_arrays(self.examples)
        attacks = {name: outcomes[name]["pred"] for name in self.conditions if name != "worst"}
        return {**attacks, "worst": metrics.worst_case(self.examples["labels"], attacks)}


def read_run(workdir: pathlib.Path) -> EvaluatedRun:
    """Reads ``results.json``, ``examples.npz`` and ``audit.npz`` of a run.

    Args:
      workdir: folder of the run, or a folder of results, or a file in it.

    Raises:
      InputError: a file is missing or damaged.
    """
    folder = results_folder(workdir)
    workdir = folder if workdir.is_file() else workdir
    results = Results.read(folder)
    examples = read_arrays(folder / EXAMPLES)
    sample: Mapping[str, np.ndarray] = {}
    with contextlib.suppress(InputError):
        sample = read_arrays(folder / AUDIT)
    with _reading(folder / EXAMPLES):
        run = EvaluatedRun(**vars(results), name=buckets.shown(workdir), examples=examples, sample=sample)
        examples["ids"], run.predictions  # missing arrays fail here, where the folder is known
    return run


def results_folder(path: pathlib.Path) -> pathlib.Path:
    """Returns the folder of results that a path means: itself, that of a run, or that around a file.

    Raises:
      InputError: there are no results.
    """
    if path.is_file():
        if not (path.parent / RESULTS).is_file():
            raise InputError(f"{path} is not a file of an evaluation; name the folder of a run or of results")
        return path.parent
    if (path / RESULTS).exists():
        return path
    if (path / EVALUATION / RESULTS).exists():
        return path / EVALUATION
    patterns = f"{EVALUATION}-*/{RESULTS}", f"*/{EVALUATION}*/{RESULTS}"  # of the run, of runs in the folder
    others = sorted(str(file.parent) for pattern in patterns for file in path.glob(pattern))
    if others:
        raise InputError(
            f"no evaluation in {path / EVALUATION}; name one of {', '.join(others[:MANY_CLASSES])}"
        )
    return path / EVALUATION


def read_runs(workdirs: Sequence[str]) -> list[EvaluatedRun]:
    """Reads several runs.

    Args:
      workdirs: folders of the runs, or their URLs, see ``storage.buckets``.

    Returns:
      The runs in that order.

    Raises:
      InputError: no run, the same folder twice, or a run that cannot be read.
    """
    places = [buckets.fetched(workdir, WITHOUT_RESULTS) for workdir in workdirs]
    folders = [results_folder(place).resolve() for place in places]
    if not folders:
        raise InputError("no run is named; give the folders of the runs to compare")
    if len(set(folders)) < len(folders):
        raise InputError("a run is named twice; name each folder once")
    return [read_run(place) for place in places]


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an ``.npz`` file of an evaluation.

    Raises:
      InputError: the file is missing or damaged.
    """
    with _reading(path), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("no .npz file, or not all of it")
        file.seek(0)
        with np.load(file) as content:
            return dict(content)


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
    """Turns the errors of a missing or damaged file into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"no evaluation in {file.parent}: {file} is missing; evaluate the run first"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        raise InputError(f"{file} is damaged ({one_line(error)}); evaluate the run again") from error


def json_text(content: Mapping[str, Any]) -> str:
    """Returns JSON for people too: lists of numbers, such as rows of a confusion matrix, are on one line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    # Only the layout changes: inside a string JSON writes a line break as \n.
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda match: f"[{' '.join(match[0][1:-1].split())}]", text)


def _per_class_csv(results: Results) -> str:
    radii = results.meta.get("class_epsilon")
    rows = [
        {
            "class": index,
            "name": results.class_name(index),
            "train_count": count,
            **({"epsilon": radii[index]} if radii else {}),
            "support": row["support"][index],
            "condition": name,
            "recall": row["recall"][index]["value"],
            "recall_low": row["recall"][index]["low"],
            "recall_high": row["recall"][index]["high"],
            "precision": row["precision"][index],
            "f_score": row["f_score"][index],
            "natural_error": row["natural_error"][index],
            "boundary_error": row["boundary_error"][index],
        }
        for index, count in enumerate(results.summary["class_counts"])
        for name, row in ((name, entry["per_class"]) for name, entry in results.conditions.items())
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
