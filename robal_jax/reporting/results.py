"""TODO reporting.results."""

import csv
import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.reporting.names import class_name
from robal_jax.storage.names import EVALUATION, EXAMPLES, RESULTS


def to_json_text(results: Mapping[str, Any]) -> str:
    """JSON for people too: lists of numbers, such as rows of a confusion matrix, stand on one line."""
    text = json.dumps(results, indent=1, allow_nan=False)
    # Only the layout is touched: inside a string JSON writes a line break as \n.
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda match: f"[{' '.join(match[0][1:-1].split())}]", text)


def per_class_csv(summary: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """Returns one row per class and condition, as CSV."""
    rows = [
        {
            "class": index,
            "name": class_name(meta, index),
            "train_count": count,
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
        for index, count in enumerate(summary["class_counts"])
        for name, row in ((name, entry["per_class"]) for name, entry in summary["conditions"].items())
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """An evaluated model: what `reporting.write_report` and the evaluation left in its folder.

    Attributes:
        name: its folder.
        meta: see `reporting.write_report`.
        summary: see `metrics.summarize`.
        examples: 'labels' [n], 'ids' [n] of the test images, 'pred_<condition>' [n] and more, by name.
        audit: see `reporting.write_report`; None if the run was not audited.
    """

    name: str
    meta: Mapping[str, Any]
    summary: Mapping[str, Any]
    examples: Mapping[str, np.ndarray]
    audit: Mapping[str, Any] | None = None

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """Predicted classes [n] by condition, 'worst' last."""
        attacks = {
            name: self.examples[f"pred_{name}"] for name in self.summary["conditions"] if name != "worst"
        }
        return {**attacks, "worst": metrics.worst_case(self.examples["labels"], attacks)}


def read_run(workdir: Path) -> EvaluatedRun:
    """Read evaluation/results.json and evaluation/examples.npz of a run.

    Args:
        workdir: folder of the run, or one of results in it.

    Returns:
        The run.

    Raises:
        InputError: a file is missing or unreadable.
    """
    folder = workdir if (workdir / RESULTS).exists() else workdir / EVALUATION
    try:
        results = json.loads((folder / RESULTS).read_text())
        with np.load(folder / EXAMPLES) as file:
            examples = dict(file)
        run = EvaluatedRun(str(workdir), results["meta"], results["summary"], examples, results.get("audit"))
        examples["ids"], run.predictions  # missing arrays fail here, where the folder is known
    except FileNotFoundError as error:
        raise InputError(f"{workdir} has not been evaluated: {error.filename} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"The evaluation in {folder} is damaged; evaluate the run again.") from error
    return run


def read_runs(workdirs: Sequence[str]) -> list[EvaluatedRun]:
    """Read several runs.

    Args:
        workdirs: folders of the runs.

    Returns:
        The runs in that order.

    Raises:
        InputError: no run, the same folder twice, or a run that cannot be read.
    """
    if len(set(workdirs)) < max(1, len(workdirs)):
        raise InputError("Name at least one folder of a run, and none twice.")
    return [read_run(Path(workdir)) for workdir in workdirs]
