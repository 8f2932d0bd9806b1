"""One round of each attack that an ensemble may have; ``autoattack.py`` has the ensembles.

A round is numbered from 0 in its stage; it has its own target, or its own start. An attack of the user's own
has one round, see :func:`own_round`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax.numpy as jnp

from robal_jax import losses
from robal_jax.attacks import autopgd
from robal_jax.attacks.fab_attack import fab, fab_start
from robal_jax.attacks.malt import malt_apgd
from robal_jax.attacks.margins import dlr
from robal_jax.attacks.pma_attack import pma
from robal_jax.attacks.square_attack import square
from robal_jax.attacks.threat import (
    Attack,
    LogitsFn,
    RandomLogitsFn,
    ThreatModel,
    like_images,
    starting_points,
)
from robal_jax.errors import InputError
from robal_jax.own_functions import broken, calling, described, imported, signature_of


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an attack in an ensemble.

    Attributes:
      threat: allowed images.
      steps: of each run of APGD, FAB and PMA.
      queries: of Square.
      eot: draws over which the gradient of a random model is averaged; 0 for any other model.
      rescaled: whether Square makes its whole schedule in its queries.
      targets: number of classes among which MALT chooses.
    """

    threat: ThreatModel
    steps: int
    queries: int
    eot: int
    rescaled: bool
    targets: int


AttackOfRound = Callable[[Settings, chex.Array], Attack]
"""``(settings, number of the round) -> attack``."""


def run_round(
    attack_of_round: AttackOfRound,
    logits_fn: LogitsFn | RandomLogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    number: chex.Array,
    *,
    settings: Settings,
) -> chex.Array:
    """Runs one round of an attack; with the first argument and the settings bound, it is that of a stage."""
    return attack_of_round(settings, number)(logits_fn, keys, images, labels)


def _fab_within(
    logits_fn: LogitsFn,
    keys: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    steps: int,
    number: chex.Array,
    targeted: bool,
) -> chex.Array:
    threat, rank, start = threat.of(labels, images.dtype), None, images
    if targeted:
        rank = number + 2
    else:  # the first run starts at the image, each restart at a random point
        start = jnp.where(number > 0, starting_points(fab_start, keys, images, threat), images)
    found = fab(logits_fn, keys, images, labels, threat=threat, rank=rank, n_iter=steps, start=start)
    # FAB finds the nearest misclassified image, which may lie outside the ball.
    near = threat.distance(found, images) <= threat.epsilon
    return jnp.where(like_images(near, images), found, images)


def _iterated(attack: Attack, settings: Settings, **of_round: Any) -> Attack:
    return partial(attack, threat=settings.threat, steps=settings.steps, **of_round)


# Restarts of APGD-CE, APGD-DLR and Square differ in their keys alone.
ATTACKS: dict[str, AttackOfRound] = {
    "apgd_ce": lambda s, _: _iterated(autopgd.apgd, s, loss=losses.cross_entropy, eot=s.eot),
    "apgd_dlr": lambda s, _: _iterated(autopgd.apgd, s, loss=dlr, eot=s.eot),
    "apgd_t": lambda s, number: _iterated(autopgd.targeted_apgd, s, rank=number + 2),
    "fab": lambda s, number: _iterated(_fab_within, s, number=number, targeted=False),
    "fab_t": lambda s, number: _iterated(_fab_within, s, number=number, targeted=True),
    "square": lambda s, _: partial(square, threat=s.threat, queries=s.queries, rescaled=s.rescaled),
    "pma": lambda s, number: _iterated(pma, s, raised=number % 2 == 1),
    "apgd_malt": lambda s, number: _iterated(malt_apgd, s, rank=number + 1, candidates=s.targets),
}
"""Attacks by name."""


def is_own(name: str) -> bool:
    """Whether an attack is the user's own, ``module:function``, by the name of the attack or its stage."""
    return ":" in name


def own_round(name: str) -> AttackOfRound:
    """The one round of an attack of the user's own, in the form of ``ATTACKS``.

    Args:
      name: ``module:function``, of ``(logits_fn, keys [B], images [B, H, W, C], labels [B], *, threat)`` to
        images of the same shape and type, within the threat model. ``threat.epsilon`` is a number, or an
        array ``[B]`` if the radii differ.

    Raises:
      InputError: it cannot be imported, or it cannot be called like this; when the round is traced: it fails,
        or returns anything else. The message is one line.
    """
    function = imported("attack", name)
    try:
        signature_of("attack", name, function).bind("logits_fn", "keys", "images", "labels", threat=None)
    except TypeError as error:
        raise broken("attack", name, f"cannot be called ({error})") from error

    def attack(
        logits_fn: LogitsFn,
        keys: chex.PRNGKey,
        images: chex.Array,
        labels: chex.Array,
        *,
        threat: ThreatModel,
    ) -> chex.Array:
        with calling("attack", name):
            found = function(logits_fn, keys, images, labels, threat=threat.of(labels, images.dtype))
        if [getattr(found, key, None) for key in ("shape", "dtype")] != [images.shape, images.dtype]:
            raise broken("attack", name, f"returns {described(found)} for images {described(images)}")
        return found

    return lambda settings, _: partial(attack, threat=settings.threat)


def require_allowed(name: str, departure: str) -> None:
    """Refuses what an attack of the user's own makes outside of the threat model; other attacks never do.

    Args:
      name: of an attack.
      departure: how far it left the threat model, see ``threat.departure``.

    Raises:
      InputError: it left the threat model.
    """
    if departure and is_own(name):
        raise InputError(
            f"attack {name!r} left the threat model ({departure}); return images within its radius and its "
            "bounds, such as threat.project(adversarial, images)"
        )
