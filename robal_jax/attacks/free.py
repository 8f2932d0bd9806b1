"""Free steps: one backward pass of a training moves the weights, and the perturbation of the images, too.

Each batch is shown several times in a row. The perturbation starts at 0, belongs to a position in the batch,
and is carried over from one showing to the next and from one batch to the next.

Source: Shafahi et al., "Adversarial Training for Free!" (NeurIPS 2019), and their code.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax.numpy as jnp

from robal_jax.attacks.threat import ThreatModel, like_images


class FreeSteps(NamedTuple):
    """How a training makes free steps.

    Attributes:
      showings: ``m``, how many times in a row each batch is shown.
      threat: bounds the perturbation; its radius is also the length of a step.
    """

    showings: int
    threat: ThreatModel


def within(delta: chex.Array, threat: ThreatModel) -> chex.Array:
    """Moves perturbations into the threat model's ball around 0; pixels of an image do not bound them.

    Args:
      delta: ``[B, H, W, C]``.
      threat: with one radius, or one per image ``[B]``.

    Returns:
      Like ``delta``.

    Example:
      >>> print(within(jnp.array([[-0.3, 0.05], [-0.3, 0.05]]), ThreatModel(jnp.array([0.1, 0.2]))))
      [[-0.1   0.05]
       [-0.2   0.05]]
    """
    span = threat.upper - threat.lower
    return dataclasses.replace(threat, lower=-span, upper=span).project(delta, jnp.zeros_like(delta))


def perturbed(images: chex.Array, delta: chex.Array, threat: ThreatModel) -> chex.Array:
    """Adds perturbations to images and clips the pixels: ``clip(x + delta, lower, upper)``.

    Args:
      images: ``x [B, H, W, C]``.
      delta: may be that of an image with a larger radius; it is moved :func:`within` this one's.
      threat: with one radius, or one per image ``[B]``.

    Returns:
      Like ``images``.

    Example:
      >>> print(perturbed(jnp.array([[0.5, 1.0]]), jnp.array([[0.1, 0.1]]), ThreatModel(0.1)))
      [[0.6 1. ]]
    """
    return jnp.clip(images + within(delta, threat), threat.lower, threat.upper)


def ascended(delta: chex.Array, gradient: chex.Array, images: chex.Array, threat: ThreatModel) -> chex.Array:
    """Moves perturbations by a step as long as the radius: ``project(delta + epsilon ascent_direction(g))``.

    The entries of clipped pixels, on which the loss does not depend, stay.

    Args:
      delta: that :func:`perturbed` was given.
      gradient: ``g``, of the loss, at the perturbed images.
      images: without perturbation.
      threat: with one radius, or one per image ``[B]``.

    Returns:
      Like ``delta``.

    Example:
      >>> delta, gradient, images = jnp.array([[[0.1, 0.1, 0.1]], [[-2.0, -3.0, 1.0]], [[0.5, 0.5, 0.95]]])
      >>> print(ascended(delta, gradient, images, ThreatModel(0.1)))
      [[0.  0.  0.1]]
      >>> print(ascended(delta, gradient, images, ThreatModel(0.05)))
      [[-0.    0.    0.05]]
    """
    delta = within(delta, threat)
    pixels = images + delta
    gradient = jnp.where((threat.lower <= pixels) & (pixels <= threat.upper), gradient, 0.0)
    radii = jnp.broadcast_to(jnp.asarray(threat.epsilon, delta.dtype), delta.shape[:1])
    return within(delta + like_images(radii, delta) * threat.ascent_direction(gradient), threat)
