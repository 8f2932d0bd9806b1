"""What several test files share: refusals, fake evaluations, the text of a page, damage to checkpoints."""

import html.parser
import importlib
import os
import shutil
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest

from robal_jax import metrics
from robal_jax.errors import InputError
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.results import (
    EVERYTHING,
    FIXED_STEPS,
    FLAGGED,
    NOT_RUN,
    PASSED,
    Gallery,
    Results,
)
from robal_jax.storage.progress import Meter

# ---------------------------------------------------------------- refusals and scripts


def refused(message, function, *arguments, **keywords):
    """Calls a function that must refuse with one short line that matches; returns the line."""
    with pytest.raises(InputError, match=message) as raised:
        function(*arguments, **keywords)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    return text


def script(name):
    """The ``main`` of a script, which takes its arguments one by one."""
    module = importlib.import_module(f"experiments.{name}")
    return lambda *arguments: module.main(list(arguments))


# ---------------------------------------------------------------- interruptions


class Look(NamedTuple):
    """One report of a job's progress."""

    title: str
    done: int
    note: str


def terminate():
    """Asks this process to stop, as a batch system does."""
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(monkeypatch, when, how=terminate):
    """Interrupts a job, once, when ``when(looks)`` holds for the looks at its progress; returns these."""
    original, looks, interrupted = Meter.update, [], []

    def update(self, done, note=""):
        looks.append(Look(self._title, done, note))
        original(self, done, note)
        if not interrupted and when(looks):
            interrupted.append(looks[-1])
            how()

    monkeypatch.setattr(Meter, "update", update)
    return looks


def assert_nothing_twice(looks):
    """Fails if a job that was interrupted did a part again."""
    assert len(looks) == len({look[:2] for look in looks}), "something was done twice"


# ---------------------------------------------------------------- evaluations that never took place

META = {
    "method": "RoBal",
    "dataset": "digits-LT",
    "main_attack": "pgd_20",
    "norm": "Linf",
    "epsilon": 0.031,
    "seed": 0,
    "versions": {"jax": "1.2"},
    "note|odd": "a|b",
}
ATTACKS = ("fgsm", "pgd_20", "new_attack")


def fake_evaluation(num_classes=10, per_class=20, seed=0, strength=1.0):
    """Labels and predictions of a model that is better on its first classes."""
    generator = np.random.default_rng(seed)
    labels = np.tile(np.arange(num_classes), per_class)
    margin = generator.normal(1.5 - labels / num_classes, 1)
    predictions = {}
    for step, name in enumerate(("clean", *ATTACKS)):
        right = margin + generator.normal(0, 0.1, len(labels)) > 0.4 * strength * step
        predictions[name] = np.where(right, labels, (labels + 1) % num_classes)
    return labels, predictions


def fake_summary(num_classes=10):
    return metrics.summarize(*fake_evaluation(num_classes), np.arange(3 * num_classes, 2 * num_classes, -1))


def fake_results(num_classes=10, meta=META, **parts):
    """Results of :func:`fake_evaluation`, with ``audit`` and ``norms`` if given."""
    return Results(meta, fake_summary(num_classes), **parts)


def curve(x, **series):
    """A curve of figures with intervals."""
    return {
        "x": x,
        "series": {
            name: [{"value": value, "low": value - 0.05, "high": value + 0.05} for value in values]
            for name, values in series.items()
        },
    }


def verdict(name, outcome, statement="All as it should be.", doubts=EVERYTHING, **evidence):
    return {
        "name": name, "title": name, "doubts": doubts, "outcome": outcome, "statement": statement,
        "evidence": evidence,
    }  # fmt: skip


AUDIT = {
    "examples": 50,
    "verdicts": [
        verdict(
            "logit_scale",
            FLAGGED,
            "PGD at 3 leaves 20 %, <at> 1 40 %.",
            FIXED_STEPS,
            accuracy={"1": 0.4, "3": 0.2},
            images=50,
        ),
        verdict("Steps", PASSED),
        verdict("Transfer", NOT_RUN, "There was no second model."),
    ],
    "curves": {
        "scale": curve([0.1, 0.9, 1, 1.1, 10], PGD=[0.5, 0.4, 0.4, 0.3, 0.3], CW=[0.3] * 5),
        "steps": curve([1, 20, 100], PGD=[0.7, 0.4, 0.39]),
        "restarts": curve([1, 2, 5], PGD=[0.4, 0.39, 0.38]),
    },
}


def norms(num_classes):
    return {"weights": np.linspace(2, 1, num_classes).tolist(), "features": [5.0] * num_classes}


def gallery(count=2, channels=1, size=8):
    """Images changed by 0.1 each way; the attack fails on the first."""
    generator = np.random.default_rng(0)
    images = generator.uniform(0.1, 0.9, (count, size, size, channels))
    return Gallery(
        images=images,
        adversarial=images + 0.1 * generator.choice([-1, 1], images.shape),
        labels=list(range(count)),
        predictions=[0, *((3 * k) % 10 for k in range(1, count))],
        condition="pgd_20",
    )


# ---------------------------------------------------------------- what a report says


class Text(html.parser.HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------- what may happen to a checkpoint's folder


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    path = biggest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(folder):
    path = biggest_file(folder)
    path.write_bytes(bytes(path.stat().st_size))


def lose(folder):
    biggest_file(folder).unlink()


def truncate(folder):
    path = biggest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def traced_work(monkeypatch):
    """A list that receives the name of each piece of work on a model when JAX traces it to compile it."""
    original, traced = Victim.compile, []

    def compile(self, work, *arguments, **options):
        name = getattr(work, "func", work).__name__

        def counted(*args, **keywords):
            stage = getattr(work, "keywords", {}).get("stage")
            traced.append(name if stage is None else stage.name)
            return work(*args, **keywords)

        return original(self, counted, *arguments, **options)

    monkeypatch.setattr(Victim, "compile", compile)
    return traced
