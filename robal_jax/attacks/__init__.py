"""Adversarial attacks, as functions that combine.

An attack knows a model only as a function from images to logits. Parameters, batch-norm mode, logit scale and
prior adjustment are closed over, so anything that can be written as such a function can be attacked::

    logits_fn = lambda images: model.predict(params, stats, images)
    threat = ThreatModel(epsilon=8 / 255)
    adversarial = pgd(logits_fn, key, images, labels, threat=threat, steps=20, step_size=2 / 255)

An attack is put together from these components:

- *Threat model* (``threat``): the images that an adversary may show. :class:`ThreatModel` has the radius, the
  norm and the pixel bounds, and knows how to project, to ascend and to measure a distance. The radius is one
  number, or a tuple with one per class, or an array with one per image. L1 is for :func:`apgd` and ensembles
  of it.
- *Start* (``threat``): the point where the search for an image begins, such as :func:`uniform_start`.
- *Loss* (``margins``, ``robal_jax.losses``): one value per image, which the attack increases. The default is
  cross entropy; :func:`negative_margin` makes CW of PGD, and :func:`dlr` ignores the scale of the logits.
- *Loop*: :func:`pgd` (``projected_gradient``; also FGSM, MIM, CW and EOT), :func:`apgd` (``autopgd``), which
  chooses its own step size, :func:`pma` (``pma_attack``), which ascends probabilities in two phases,
  :func:`fab` (``fab_attack``), which minimises the distance, :func:`square` (``square_attack``), which needs
  no gradient; :func:`fmn` and :func:`ddn` (``minimum_norm``) minimise the distance, too, and return it.
- *Target*: :func:`ranked_class` by logit, :func:`nearest_classes` by distance (``malt``).
- *Combination* (``combined``): :func:`multi_targeted` takes an attack and is an attack;
  :func:`shortest_adversarial` follows an attack to the decision boundary; :func:`scaled` takes a model and is
  a model, and so is :func:`bpda` (``bpda_gradient``), which replaces a gradient that leads nowhere.
- *Ensemble* (``autoattack``): several attacks, also of your own, of which each sees only the images that are
  left.
  ``robal_jax.autoattack`` runs AutoAttack.

Settings are bound with ``functools.partial``; the result is called with a model, a key, images and labels:

>>> from functools import partial
>>> import jax, jax.numpy as jnp
>>> attack = partial(pgd, threat=ThreatModel(epsilon=0.1), steps=10, step_size=0.025)
>>> cw = partial(attack, loss=negative_margin, restarts=3)
>>> strongest = partial(multi_targeted, attack=attack)

>>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
>>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
>>> for attack in (cw, strongest):
...     found = jax.jit(partial(attack, logits_fn))(jax.random.key(0), images, labels)
...     print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
[0.55 0.3 ] [1 0]
[0.55 0.3 ] [1 0]

Noise is drawn per image, from that image's key. With one key per image, a result does not depend on how
images are grouped into batches or spread over devices; a single key is split by position.

Arguments are checked where they are passed in: labels are integers ``[B]``, images are floats within the
threat model's bounds, logits are floats ``[B, K]``; anything else raises ValueError. Values, as opposed to
shapes and types, are not known inside ``jax.jit`` and are not checked there: a label that is no class then
counts as misclassified. Images are at least float32, because rounding to fewer bits would leave the ball; a
model may compute in any type.
"""

from robal_jax.attacks.autopgd import apgd, targeted_apgd
from robal_jax.attacks.bpda_gradient import bpda
from robal_jax.attacks.combined import multi_targeted, shortest_adversarial
from robal_jax.attacks.fab_attack import fab
from robal_jax.attacks.free import FreeSteps
from robal_jax.attacks.malt import malt_apgd, nearest_classes
from robal_jax.attacks.margins import (
    dlr,
    margin,
    negative_margin,
    probability_margin,
    ranked_class,
    targeted_dlr,
    targeted_margin,
)
from robal_jax.attacks.minimum_norm import MINIMUM_NORM, Closest, check_minimum_norm, ddn, fmn
from robal_jax.attacks.pma_attack import pma
from robal_jax.attacks.projected_gradient import loss_gradient, pgd, pgd_iterates, pgd_path, scaled
from robal_jax.attacks.square_attack import square
from robal_jax.attacks.threat import (
    NORMS,
    STARTS,
    Attack,
    LogitsFn,
    RandomLogitsFn,
    Start,
    ThreatModel,
    clean_start,
    gaussian_start,
    like_images,
    one_sided_start,
    scaled_start,
    start_within,
    starting_points,
    uniform_start,
)

__all__ = [
    "MINIMUM_NORM",
    "NORMS",
    "STARTS",
    "Attack",
    "Closest",
    "FreeSteps",
    "LogitsFn",
    "RandomLogitsFn",
    "Start",
    "ThreatModel",
    "apgd",
    "bpda",
    "check_minimum_norm",
    "clean_start",
    "ddn",
    "dlr",
    "fab",
    "fmn",
    "gaussian_start",
    "like_images",
    "loss_gradient",
    "malt_apgd",
    "margin",
    "multi_targeted",
    "nearest_classes",
    "negative_margin",
    "one_sided_start",
    "pgd",
    "pgd_iterates",
    "pgd_path",
    "pma",
    "probability_margin",
    "ranked_class",
    "scaled",
    "scaled_start",
    "shortest_adversarial",
    "square",
    "start_within",
    "starting_points",
    "targeted_apgd",
    "targeted_dlr",
    "targeted_margin",
    "uniform_start",
]
