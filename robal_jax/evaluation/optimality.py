"""The optimality of each attack of the ensemble, from the smallest radius at which it breaks each image.

An attack within a fixed radius has a distance, too: the smallest radius at which it succeeds. It is searched
by bisection among some radii up to the threat model's, for each attack alone, on the audit's sample. An image
that an attack breaks within a radius counts as broken within all larger ones, as in AttackBench.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import chex
import numpy as np

from robal_jax import builder, metrics
from robal_jax.attacks import LogitsFn, ThreatModel, autoattack
from robal_jax.certificates import bisect
from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.evaluation.additions import Addition, Arrays
from robal_jax.evaluation.measurements import outputs, sample_ids
from robal_jax.evaluation.steps import Judged, check, judge
from robal_jax.evaluation.victim import Victim
from robal_jax.reporting.results import EvaluatedRun
from robal_jax.storage.names import OPTIMALITY
from robal_jax.storage.progress import Meter
from robal_jax.storage.unfinished import Unfinished

FACTORS = tuple(eighth / 8 for eighth in range(1, 9))
"""Parts of the threat model's radius at which images are attacked."""


def check_comparable(job: builder.Evaluation) -> None:
    """Refuses, before any attack, an evaluation that asks for the optimality of what cannot be compared.

    Raises:
      InputError: there is no ensemble or no sample, or the model is random.
    """
    if not job.optimality:
        return
    if not job.ensemble:
        raise InputError(
            "optimality compares the attacks of an ensemble; set evaluation.autoattack (version in Python)"
        )
    if not job.audit_examples:
        raise InputError(
            "optimality is measured on the audit's sample, which is empty; set evaluation.audit.examples "
            "(audit in Python)"
        )
    if job.version == "rand":
        raise InputError("an attack on a random model has no distance; leave optimality out")


def attack_within(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    factors: chex.Array,
    *,
    number: chex.Array,
    stage: autoattack.Stage,
    threat: ThreatModel,
) -> Judged:
    """Returns how the model classifies what one round of an attack makes at parts ``[B]`` of the radius."""
    within = threat.of(labels).scaled(factors)
    keys = stage.keys(keys, number)
    shown = autoattack.with_threat(stage, within).attack(logits_fn, keys, images, labels, number)
    return judge(logits_fn, shown, images, within)


def attacker(
    victim: Victim, job: builder.Evaluation, sample: np.ndarray, stage: autoattack.Stage
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns ``(places in the sample [m], numbers of radii [m]) -> bool [m]``, whether images survive."""
    size = victim.size_for(len(sample))
    step = victim.compile(partial(attack_within, stage=stage, threat=job.threat), size=size)

    def survives(places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        right = np.ones(len(places), bool)
        for number in range(stage.rounds):
            left = np.flatnonzero(right)
            if not len(left):
                break
            ids, factors = sample[places[left]], np.float32(np.take(FACTORS, numbers[left]))
            judged, labels = step(ids, factors, number=np.int32(number)), victim.labels[ids]
            check(stage.name, judged, job.threat.of(labels).scaled(factors), victim.pixels)
            right[left] = judged["pred"] == labels
        return right

    return survives


def survived(victim: Victim, job: builder.Evaluation, kept: Unfinished, stop: hosts.Stop) -> Arrays | None:
    """Returns how many of the radii each image of the sample survives, by attack, and 'sample', their ids.

    An image that is misclassified without an attack survives none. An attack that only some models need (see
    'fast' in ``autoattack.VERSIONS``) is not compared. Returns None if stopped before the end.
    """
    sample = sample_ids(len(victim.labels), job.audit_examples, job.seed)
    stages = [stage for stage in job.ensemble if not (stage.bpda or stage.conditional)]
    logits = victim.compile(outputs)(sample)["logits"]
    most = np.where(logits.argmax(-1) == victim.labels[sample], len(FACTORS), 0)
    found = dict(kept.arrays) or {
        f"{stage.name}/{end}": values.copy()
        for stage in stages
        for end, values in {"low": 0 * most, "high": most}.items()
    }
    with hosts.only_first(lambda: Meter("optimality", len(stages) * len(sample))) as meter:
        for place, stage in enumerate(stages):
            low, high = found[f"{stage.name}/low"], found[f"{stage.name}/high"]
            for _ in bisect(low, high, attacker(victim, job, sample, stage), size=victim.size):
                meter.update(place * len(sample) + int(np.sum(low == high)), stage.name)
                if stop or kept.due:
                    kept.save(found)
                if stop:
                    return None
    kept.save(found)
    return {"sample": sample, **{stage.name: found[f"{stage.name}/low"] for stage in stages}}


def with_optimality(
    run: EvaluatedRun, found: Arrays, victim: Victim, job: builder.Evaluation
) -> EvaluatedRun:
    """Returns results with the optimality of each attack, and what it leaves at each radius.

    ``xi_a = sum_j (rho(0) - rho_a(r_j)) / sum_j (rho(0) - rho_*(r_j))`` with the accuracy ``rho_a(r_j)`` that
    attack ``a`` leaves at the ``j``-th radius, and that under the best attack on each image, ``rho_*``. It is
    AttackBench's ratio of areas (:func:`robal_jax.distances.attack_optimality`), but summed over radii, so
    that the threat model's own counts. If nothing is broken, there is none. A minimum-norm attack that was
    evaluated is compared, too, its distances rounded up to the radii.
    """
    sample, radii = found["sample"], len(FACTORS)
    right = run.predictions["clean"][sample] == victim.labels[sample]
    survived = {name: np.where(right, found[name], 0) for name in found if name != "sample"}
    if job.minimum_norm:
        own = run.examples[f"distance_{job.minimum_norm}"][sample]
        parts = own / np.asarray(job.threat.of(victim.labels[sample]).epsilon)
        survived[job.minimum_norm] = np.where(right, np.searchsorted(FACTORS, parts), 0)
    best = np.min(list(survived.values()), axis=0)

    def broken(survived: np.ndarray) -> int:
        """Number of pairs of a radius and an image that is broken there."""
        return int(np.sum(radii - survived, where=right))

    def robust(survived: np.ndarray) -> list[dict[str, float]]:
        return [metrics.share(survived > place) for place in range(radii)]

    most = broken(best)
    summary = {
        **run.summary,
        "optimality": {
            "factors": list(FACTORS),
            "examples": len(sample),
            "attacks": {
                name: {"optimality": broken(each) / most if most else None, "robust": robust(each)}
                for name, each in survived.items()
            },
            "best": robust(best),
        },
    }
    return dataclasses.replace(run, summary=summary)


ADDITION = Addition("optimality", OPTIMALITY, "the distances of the attacks", survived, with_optimality)
