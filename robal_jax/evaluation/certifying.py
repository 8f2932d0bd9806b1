"""The certified accuracy, a lower bound of the robust accuracy, beside that under attack, an upper estimate.

See ``certificates``: each image is certified within the threat model's radius, within a part of it, or not.
"""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import builder, certificates, metrics
from robal_jax.attacks import NORMS, LogitsFn, ThreatModel
from robal_jax.attacks.threat import distance_tolerance
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.evaluation.additions import Addition, Arrays
from robal_jax.evaluation.outcomes import broken_though_certified
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.results import EvaluatedRun
from robal_jax.storage.names import CERTIFIED
from robal_jax.storage.progress import Meter
from robal_jax.storage.unfinished import Unfinished

FACTORS = (0.125, 0.25, 0.5, 1.0)
"""Parts of the threat model's radius within which images are certified."""

IMAGES_AT_ONCE = 16  # per device; one takes a good part of a second


def check_certifiable(victim: Victim, job: builder.Evaluation) -> None:
    """Refuses, before any attack, an evaluation that asks for what cannot be certified.

    Raises:
      InputError: the norm is not L-infinity, the model is random, or it has an operation without a rule.
    """
    if not job.certified:
        return
    if job.threat.norm != "linf":
        raise InputError(
            f"certified accuracies are for L-infinity, and the norm is {NORMS[job.threat.norm]}; "
            "leave them out"
        )
    if job.version == "rand":
        raise InputError("a random model cannot be certified; leave certified accuracies out")
    images = jax.ShapeDtypeStruct((1, *victim.images.shape[1:]), np.float32)

    def bounds(images: chex.Array) -> chex.Array:
        labels = jnp.zeros(1, jnp.int32)
        return certificates.margin_bounds(victim.predict, images, images, labels, method="intervals")

    jax.eval_shape(bounds, images)


def certify(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    radius: chex.Array,
    *,
    threat: ThreatModel,
) -> dict[str, chex.Array]:
    """Returns whether images are certified within their radii, both ``[B]``, and the bounds of ``threat``.

    Each radius is enlarged by :func:`distance_tolerance`, because rounding may take an attack beyond its own.
    """
    del keys
    within = dataclasses.replace(threat, epsilon=radius + distance_tolerance(threat))
    return {"certified": certificates.certified(logits_fn, images, labels, threat=within)}


def certified(victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop) -> Arrays | None:
    """Returns within how many of the radii each image is certified, ``{'radii': [n]}``; None if stopped."""
    total, size = len(victim.labels), min(victim.size, IMAGES_AT_ONCE * jax.device_count())
    step = victim.compile(partial(certify, threat=job.threat), size=size)
    epsilon = np.broadcast_to(np.float32(job.threat.of(victim.labels).epsilon), total)
    low = kept.arrays.get("low", np.zeros(total, int))
    high = kept.arrays.get("high", np.full(total, len(FACTORS)))

    def certifies(ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return step(ids, np.float32(np.take(FACTORS, numbers) * epsilon[ids]))["certified"]

    with hosts.only_first(lambda: Meter("certified", total, int(np.sum(low == high)))) as meter:
        for _ in certificates.bisect(low, high, certifies, size=size):
            done = low == high
            meter.update(int(done.sum()), f"{np.sum(low == len(FACTORS))} at the whole radius")
            if stop or done.all() or kept.due:
                kept.save({"low": low, "high": high})
            if stop and not done.all():
                return None
    return {"radii": low}


def with_certified(run: EvaluatedRun, found: Arrays, victim: Victim, job: builder.Evaluation) -> EvaluatedRun:
    """Returns results with the certified accuracies; the audit is flagged if an attack refutes them."""
    levels, labels = found["radii"], victim.labels
    members = {"accuracy": labels >= 0, **{name: np.isin(labels, part) for name, part in job.groups.items()}}
    shares = [
        {name: metrics.share(levels[member] > number) for name, member in members.items()}
        for number in range(len(FACTORS))
    ]
    predictions = run.predictions
    wrong = {name: predictions[name] != labels for name in ("clean", "worst")}
    refuted = (levels == len(FACTORS)) & wrong["worst"] | (levels > 0) & wrong["clean"]
    if job.minimum_norm:
        within = np.array([-1, *FACTORS])[levels] * job.threat.of(labels).epsilon
        refuted |= run.examples[f"distance_{job.minimum_norm}"] <= within
    broken = int(np.sum(refuted))
    summary = {
        **run.summary,
        "certified": {"factors": list(FACTORS), "broken": broken, "by_factor": shares},
    }
    return dataclasses.replace(run, summary=summary, audit=_with_verdict(run.audit, broken, len(labels)))


def _with_verdict(audit: Any, broken: int, images: int) -> Any:
    """Returns the audit, flagged if certified images are broken; None if there is nothing in it."""
    audit = audit or {"examples": 0, "verdicts": [], "curves": {}}
    verdicts = [verdict for verdict in audit["verdicts"] if verdict["name"] != "certified"]
    if broken:
        verdicts.append(broken_though_certified(broken, images)._asdict())
    return {**audit, "verdicts": verdicts} if verdicts else None


ADDITION = Addition("certified", CERTIFIED, "the certified accuracies", certified, with_certified)
