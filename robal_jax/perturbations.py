"""Perturbations of the weights: a step's gradient is taken at weights that are worse for its batch."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from robal_jax import checks


class Perturbation(NamedTuple):
    """A perturbation of the weights.

    Attributes:
      perturb: ``(params, direction, epoch) -> params``; the epoch is counted from 1.
      of_optimizer: whether the direction is a step of the run's optimiser up the loss, with its momentum and
        weight decay, in place of the gradient of the loss of the whole batch.
      counts_pass: whether the training passes that find the direction move the running statistics, too.
    """

    perturb: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Numeric], chex.ArrayTree]
    of_optimizer: bool = False
    counts_pass: bool = False


DIRECTIONS = ("gradient", "optimizer")

TINY = 1e-20


def of_its_length(params: chex.ArrayTree, direction: chex.ArrayTree) -> chex.ArrayTree:
    """Scales a direction to the length of the weights, tensor by tensor: ``||w|| d / (||d|| + 1e-20)``.

    Norms are Euclidean, over the whole tensor. Tensors with one axis (batch norm, biases) get 0.

    Args:
      params: ``w``.
      direction: ``d``, like the params.

    Returns:
      Like the params.

    Source: Wu et al. (NeurIPS 2020), equation 9, and their code.

    Example:
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([1.0])}
      >>> print(of_its_length(params, {"kernel": jnp.array([[0.0], [2.0]]), "bias": jnp.array([1.0])}))
      {'bias': Array([0.], dtype=float32), 'kernel': Array([[0.],
             [5.]], dtype=float32)}
    """

    def scale(w: chex.Array, d: chex.Array) -> chex.Array:
        if w.ndim < 2:
            return jnp.zeros_like(w)
        return jnp.linalg.norm(w.reshape(-1)) / (jnp.linalg.norm(d.reshape(-1)) + TINY) * d

    return jax.tree.map(scale, params, direction)


def awp(
    gamma: float = 0.005, start: int = 1, direction: str = "gradient", counts_pass: bool = False
) -> Perturbation:
    """Adversarial weight perturbation: ``w + gamma ||w|| g / ||g||``, tensor by tensor.

    The step's gradient, weight decay and momentum are those of the perturbed weights; the update is applied
    to the weights themselves. The adversarial images are those of the unperturbed weights, and the batch-norm
    moments those of the perturbed pass.

    Args:
      gamma: length of the perturbation as a part of the weights', > 0; 0.01 around adversarial training and
        0.005 around TRADES in the paper.
      start: first epoch with a perturbation, counted from 1; the released TRADES-AWP takes 10.
      direction: ``g``, one of ``DIRECTIONS``: the gradient; or a step of the optimiser up the loss, from the
        momentum that it has, as in the code of RobustLT.
      counts_pass: whether the passes that find it move the running statistics before those of the perturbed
        weights, as in the code of RobustLT.

    Returns:
      The perturbation.

    Source: Wu et al. (NeurIPS 2020).

    Example:
      >>> params, gradients = {"kernel": jnp.array([[3.0], [4.0]])}, {"kernel": jnp.array([[0.0], [2.0]])}
      >>> print(awp(gamma=0.1, start=2).perturb(params, gradients, 2)["kernel"].reshape(-1))
      [3.  4.5]
      >>> print(awp(gamma=0.1, start=2).perturb(params, gradients, 1)["kernel"].reshape(-1))
      [3. 4.]
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; use one of {', '.join(DIRECTIONS)}")
    checks.positive(gamma=gamma)
    checks.at_least(1, start=start)

    def perturb(params: chex.ArrayTree, towards: chex.ArrayTree, epoch: chex.Numeric) -> chex.ArrayTree:
        size = jnp.where(epoch >= start, gamma, 0.0)
        difference = of_its_length(params, towards)
        return jax.tree.map(lambda w, v: w + size.astype(w.dtype) * v, params, difference)

    return Perturbation(perturb, direction == "optimizer", counts_pass)


def none() -> None:
    """No perturbation."""


PERTURBATIONS: dict[str, Callable[..., Perturbation | None]] = {"none": none, "awp": awp}
"""Perturbations by name: functions that return a :class:`Perturbation`, or None."""
