"""The Square Attack: a random search that uses nothing of a model but its logits.

It takes no gradient, so it also breaks a model that only hides its gradients::

    adversarial = square(logits_fn, key, images, labels, threat=ThreatModel(epsilon=8 / 255))

Each query changes a square window of the best image so far; the change is kept if it reduces the lead of the
true class. All shapes are fixed: windows are masks, and misclassified images stay in the batch, unchanged,
until all images are misclassified.

Source: Andriushchenko, Croce, Flammarion and Hein, "Square Attack" (ECCV 2020), with the constants that
AutoAttack (Croce and Hein, ICML 2020) runs it with.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from robal_jax import checks
from robal_jax.attacks.attempts import verdicts
from robal_jax.attacks.margins import margin
from robal_jax.attacks.threat import LogitsFn, ThreatModel, check_attack
from robal_jax.keys import fold_in, image_keys

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Numbers of earlier queries after which the share of the image that a square covers is halved again."""

MEANT_FOR = 10_000  # queries

TINY = 1e-12  # prevents 0 / 0 in a window without perturbation


Draw = Callable[[chex.PRNGKey, chex.Array | int, int], chex.Array]
"""``(keys [B], number, count)`` to uniforms in [0, 1) ``[B, count]``; number 0 is the start, then queries."""


def uniform_draw(keys: chex.PRNGKey, number: chex.Array | int, count: int) -> chex.Array:
    """Uniforms ``[B, count]`` of each image, which depend on its own key and the query's number only."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(fold_in(keys, number))


def square(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    queries: int = 5000,
    p_init: float = 0.8,
    rescaled: bool = False,
) -> chex.Array:
    """The Square Attack: random search for a small margin, from the logits alone.

    Args:
      logits_fn: the model; the logits of an image must not depend on other images.
      key: one key, or one per image ``[B]``.
      images: ``[B, H, W, C]`` within the threat model's bounds.
      labels: ``[B]``.
      threat: allowed images.
      queries: largest number of queries per image, at least 1, after the one for its start.
      p_init: share of the image that the first squares cover, in (0, 1].
      rescaled: squares shrink as many times, but over ``queries`` instead of 10,000; AutoAttack's do not.

    Returns:
      The best images found ``[B, H, W, C]``, misclassified or not; no gradient flows back. An image that is
      misclassified without an attack may come back correctly classified, so the caller must leave it out.

    Raises:
      ValueError: an argument or the model's logits have a wrong shape, type or range, or the images are too
        small (see :func:`l2_moves`).

    Source: Andriushchenko et al. (ECCV 2020).

    Example:
      >>> logits_fn = lambda x: jnp.outer(x.reshape(-1) - 0.5, jnp.array([-1.0, 1.0]))  # class 1 is bright
      >>> images, labels = jnp.array([0.45, 0.2]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> found = square(logits_fn, jax.random.key(0), images, labels, threat=ThreatModel(0.1), queries=20)
      >>> print(jnp.array_str(found.reshape(-1), precision=2), logits_fn(found).argmax(-1))
      [0.55 0.3 ] [1 0]
    """
    settings: dict[str, Any] = {"queries": queries, "p_init": p_init, "rescaled": rescaled}
    return square_search(logits_fn, key, images, labels, threat=threat, **settings).best


class Search(NamedTuple):
    """State of the search.

    Attributes:
      best: image with the smallest margin so far ``[B, H, W, C]``.
      margin: its margin ``[B]``; at most 0 if the image is misclassified.
      wrong: whether it is misclassified, so that its search has ended, bool ``[B]``.
      queries_used: number of queries until the search of an image ended, including its start ``[B]``.
      number: of the next query; 0 is the start.
    """

    best: chex.Array
    margin: chex.Array
    wrong: chex.Array
    queries_used: chex.Array
    number: chex.Array


def square_search(
    logits_fn: LogitsFn,
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    *,
    threat: ThreatModel,
    queries: int = 5000,
    p_init: float = 0.8,
    rescaled: bool = False,
    draw: Draw = uniform_draw,
) -> Search:
    """The search of :func:`square`, with its whole last state.

    ``x_{q+1} = x'`` if ``margin(x') < margin(x_q)``, else ``x_q``;  ``x' = propose(x_q)``

    while ``x_q`` is classified correctly; the margin is ``z_y - max_{i != y} z_i``. (The released code stops
    at a margin of 0, too, where a tie may go to the true class.) A candidate whose logits are not finite is
    kept only while there is no other, see ``attempts.verdicts``. The squares' share of the image is
    ``p_init``, halved after each of ``HALVINGS`` queries, whatever ``queries`` is unless it is rescaled. The
    loop ends when all images are misclassified. It compiles once, and contains the model once.

    Args:
      logits_fn: see :func:`square`.
      key: see :func:`square`.
      images: ``x [B, H, W, C]`` within the threat model's bounds.
      labels: ``y [B]``.
      threat: allowed images.
      queries: see :func:`square`.
      p_init: see :func:`square`.
      rescaled: see :func:`square`.
      draw: source of the uniforms, a hook for tests: they replay the draws of another implementation.

    Returns:
      The last state; no gradient flows back.

    Raises:
      ValueError: see :func:`square`.

    Source: Andriushchenko et al. (ECCV 2020), algorithms 1 to 3, in the form of AutoAttack's released code.
    The released code draws one square for a whole batch; here each image has its own.
    """
    threat = check_attack(threat, images, labels)
    keys = image_keys(key, images)
    checks.channels_last(images)
    checks.at_least(1, queries=queries)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init is {p_init}; it must be in (0, 1]")
    images = jax.lax.stop_gradient(images)

    def moves(threat: ThreatModel) -> Moves:
        return MOVES[threat.norm](threat, images.shape[1:], p_init)

    start_draws, _, draws, _ = moves(threat)

    def start(_: Search) -> chex.Array:
        first = threat.each(lambda threat, *of_image: moves(threat).start(*of_image))
        return first(draw(keys, 0, start_draws), images)

    def propose(search: Search) -> chex.Array:
        earlier = search.number - 1
        earlier = earlier * MEANT_FOR // queries if rescaled else earlier
        halvings = jnp.sum(earlier > jnp.array(HALVINGS))
        following = threat.each(lambda threat, u, *of_image: moves(threat).propose(u, halvings, *of_image))
        return following(draw(keys, search.number, draws), search.best, images)

    def ask(search: Search) -> Search:
        # The start is a query like all later ones, so that the model is compiled once.
        candidates = jax.lax.cond(search.number == 0, start, propose, search)
        logits = checks.logits_of(len(images), logits_fn(candidates))
        found = margin(logits, labels).astype(images.dtype)
        right, wrong = verdicts(logits, labels)
        unseen = ~right & ~wrong & jnp.isinf(search.margin)  # not finite, and nothing else was met
        better = ~search.wrong & (wrong | (right & (found < search.margin)))
        return Search(
            jnp.where((better | unseen)[:, None, None, None], candidates, search.best),
            jnp.where(better, found, search.margin),
            search.wrong | wrong,
            search.queries_used + (~search.wrong).astype(int),
            search.number + 1,
        )

    def unfinished(search: Search) -> chex.Array:
        return (search.number <= queries) & (~search.wrong).any()

    unknown = jnp.full(len(images), jnp.inf, images.dtype)
    none = jnp.zeros(len(images), bool)
    begin = Search(images, unknown, none, jnp.zeros(len(images), int), jnp.zeros((), int))
    return jax.lax.stop_gradient(jax.lax.while_loop(unfinished, ask, begin))


class Moves(NamedTuple):
    """The search in one norm, for one image.

    Attributes:
      start_draws: number ``S`` of uniforms for a start.
      start: uniforms ``[S]`` and image ``[H, W, C]`` to the first candidate ``[H, W, C]``.
      draws: number ``N`` of uniforms for a proposal.
      propose: uniforms ``[N]``, number of halvings of the share, best image and image ``[H, W, C]`` to the
        next candidate.
    """

    start_draws: int
    start: Callable[[chex.Array, chex.Array], chex.Array]
    draws: int
    propose: Callable[[chex.Array, chex.Array, chex.Array, chex.Array], chex.Array]


def linf_moves(threat: ThreatModel, shape: tuple[int, ...], p_init: float) -> Moves:
    """L-infinity: vertical stripes of ``+-epsilon``, then squares of ``+-2 epsilon``, clipped to the ball.

    Args:
      threat: allowed images.
      shape: ``(H, W, C)`` of an image.
      p_init: share of the image that the first squares cover.

    Returns:
      The moves, with ``W C`` draws per start and ``2 + C`` per query: row, column, sign of each channel.
    """
    height, width, channels = shape
    sides = np.clip(_sides(shape, p_init), 1, min(height, width))

    def start(uniforms: chex.Array, image: chex.Array) -> chex.Array:
        return threat.project(image + threat.epsilon * _signs(uniforms, image).reshape(1, width, -1), image)

    def propose(
        uniforms: chex.Array, halvings: chex.Array, best: chex.Array, image: chex.Array
    ) -> chex.Array:
        side = jnp.array(sides)[halvings]
        window = _window(_corner(uniforms[:2], side, shape), side, shape)
        step = 2 * threat.epsilon * _signs(uniforms[2:], image)[None, None]
        return threat.project(best + jnp.where(window, step, 0), image)

    return Moves(width * channels, start, 2 + channels, propose)


def l2_moves(threat: ThreatModel, shape: tuple[int, ...], p_init: float) -> Moves:
    """L2: tiles of :func:`eta`, then the perturbation of one window moved into another, with an eta added.

    With the perturbation ``d``, windows ``w`` and ``v``, and ``||.||_c`` the length of each channel:

    ``n = +-eta + d_w / ||d_w||_c``;  ``d_v <- 0``;
    ``d_w <- n / ||n||_c * sqrt(max(epsilon^2 - ||d||^2, 0) / C + ||d_{w or v}||^2)``

    The whole perturbation is scaled to the length ``epsilon`` before it is clipped to the bounds.

    Args:
      threat: allowed images.
      shape: ``(H, W, C)`` of an image.
      p_init: share of the image that the first squares cover.

    Returns:
      The moves, with ``5 + C`` draws per query: two corners, whether eta is transposed, sign of each channel.

    Raises:
      ValueError: the images are less than 5 pixels high or wide, so that there are no tiles to start from.
    """
    smaller = min(shape[:2])
    if smaller < 5:
        raise ValueError(
            f"images have {shape[0]} x {shape[1]} pixels; the Square Attack in L2 needs 5 x 5; leave it out"
        )
    # Odd, at least 3, and within the image.
    sides = np.clip([side + (side + 1) % 2 for side in _sides(shape, p_init)], 3, (smaller - 1) | 1)
    patterns = np.stack([[_placed(p, shape) for p in (eta(side), eta(side).T)] for side in sides])
    tiles, tile = _tiles(shape)
    count = int(tile.max()) + 1

    def bring(delta: chex.Array, image: chex.Array) -> chex.Array:
        delta = delta / (_length(delta) + TINY) * threat.epsilon
        return jnp.clip(image + delta, threat.lower, threat.upper)

    def start(uniforms: chex.Array, image: chex.Array) -> chex.Array:
        uniforms = uniforms.reshape(count, -1)[tile]
        pattern = jnp.where(uniforms[..., 0] > 0.5, tiles[1], tiles[0]).astype(image.dtype)
        return bring(pattern[..., None] * _signs(uniforms[..., 1:], image), image)

    def propose(
        uniforms: chex.Array, halvings: chex.Array, best: chex.Array, image: chex.Array
    ) -> chex.Array:
        delta = best - image
        side = jnp.array(sides)[halvings]
        corner, emptied_corner = (_corner(u, side, shape) for u in (uniforms[:2], uniforms[2:4]))
        window, emptied = (_window(c, side, shape) for c in (corner, emptied_corner))
        pattern = jnp.asarray(patterns, image.dtype)[halvings, (uniforms[4] > 0.5).astype(int)]
        # A pattern is 0 outside its square, so the roll brings only zeros round the edge.
        pattern = jnp.roll(pattern, corner, (0, 1))[..., None] * _signs(uniforms[5:], image)[None, None]

        old = jnp.where(window, delta, 0)
        new = pattern + old / (TINY + _length(old, (0, 1)))
        unused = jnp.maximum(threat.epsilon**2 - jnp.square(_length(delta)), 0) / shape[2]
        freed = jnp.square(_length(jnp.where(window | emptied, delta, 0)))
        new = new / (TINY + _length(new, (0, 1))) * jnp.sqrt(unused + freed)
        return bring(jnp.where(window, new, jnp.where(emptied, 0, delta)), image)

    return Moves(count * (1 + shape[2]), start, 5 + shape[2], propose)


MOVES = {"linf": linf_moves, "l2": l2_moves}


def _sides(shape: tuple[int, ...], p_init: float) -> list[int]:
    """Side of a square that covers the share ``p_init / 2^k`` of the image, for each ``k``."""
    height, width, _ = shape
    return [round(math.sqrt(p_init / 2**k * height * width)) for k in range(len(HALVINGS) + 1)]


def _corner(uniforms: chex.Array, side: chex.Array, shape: tuple[int, ...]) -> chex.Array:
    """First row and column of a square; the last possible ones never occur, as in the released code."""
    return jnp.floor((jnp.array(shape[:2]) - side).astype(uniforms.dtype) * uniforms).astype(int)


def _window(corner: chex.Array, side: chex.Array, shape: tuple[int, ...]) -> chex.Array:
    """Whether each pixel is in a square, bool ``[H, W, 1]``."""
    rows, columns = (jnp.arange(size) - first for size, first in zip(shape[:2], corner, strict=True))
    inside = [(offset >= 0) & (offset < side) for offset in (rows, columns)]
    return (inside[0][:, None] & inside[1][None, :])[..., None]


def _signs(uniforms: chex.Array, image: chex.Array) -> chex.Array:
    return jnp.sign(2 * uniforms - 1).astype(image.dtype)


def _pyramid(height: int, width: int) -> np.ndarray:
    """Square rings, ``sum_{k >= d} 1 / (k + 1)^2`` at distance ``d`` from the centre, scaled to length 1."""
    rows, columns = (np.abs(np.arange(size) - size // 2) for size in (height, width))
    terms = 1.0 / np.arange(1, max(height, width) // 2 + 2) ** 2
    rings = terms[::-1].cumsum()[::-1]
    pyramid = rings[np.maximum(rows[:, None], columns[None, :])]
    return pyramid / np.sqrt(np.square(pyramid).sum())


def eta(side: int) -> np.ndarray:
    """The pattern ``[s, s]`` that L2 adds to a square: a pyramid above a negative one, length 1 in all."""
    upper = side // 2  # 0 for a single pixel, which belongs to the lower half
    pattern = np.concatenate([_pyramid(upper, side), -_pyramid(side - upper, side)])
    return pattern / np.sqrt(np.square(pattern).sum())


def _placed(values: np.ndarray, shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    """Values placed from row and column ``first`` on, cut to the image, and 0 around them, ``[H, W]``."""
    height, width, _ = shape
    return np.pad(values, ((first, height), (first, width)))[:height, :width]


def _tiles(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Centred grids of etas and of their transposes ``[2, H, W]``, and the number of each pixel's tile."""
    smaller = min(shape[:2])
    side = smaller // 5
    first = (smaller - 5 * side) // 2
    counts = [size // side for size in shape[:2]]
    grids = [_placed(np.tile(pattern, counts), shape, first) for pattern in (eta(side), eta(side).T)]
    tile = np.arange(math.prod(counts)).reshape(counts).repeat(side, 0).repeat(side, 1)
    return np.stack(grids), _placed(tile, shape, first)


def _length(x: chex.Array, axis: tuple[int, ...] | None = None) -> chex.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))
