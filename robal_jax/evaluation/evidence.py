"""Statistics behind the audit's verdicts: exact tests of shares and gaps, and what a sample is able to show.

An honest model must not be flagged by chance. Every check of the audit tests at ``LEVEL``, or at a lower one
if there are more checks, so that the probability that any of them flags a model whose true shares and gaps
are within the margins is at most ``FAMILY_LEVEL`` (Bonferroni). ``scipy`` is imported where it is needed,
because that takes a second. The tests of shares and gaps are exact. That of a mean, which the check of the
logit scale makes beside its gap, holds for normal differences, and about so for others.
"""

from typing import NamedTuple

import numpy as np

FAMILY_LEVEL = 0.05
"""Highest probability that the audit flags anything by chance."""

CHECKS = 13
"""Number of checks in every audit, with that of the stored images."""

LEVEL = FAMILY_LEVEL / CHECKS
"""Level of each of these checks, one-sided."""

SHOWN = 0.10
"""A sample is too small for a check if it could not show a gap of this size."""


class Gap(NamedTuple):
    """How much lower the accuracy under one attack is than under another, on the same images.

    Attributes:
      lost: images that only the first attack breaks.
      gained: images that only the second one breaks.
      images: their number ``n``.
    """

    lost: int
    gained: int
    images: int

    @property
    def value(self) -> float:
        """``(lost - gained) / n``; above 0 if the first attack is stronger, 0 without images."""
        return (self.lost - self.gained) / max(1, self.images)


def gap_between(attack: np.ndarray, than: np.ndarray) -> Gap:
    """Compares which images are right under two attacks, both bool ``[n]``.

    Example:
      >>> gap = gap_between(np.array([0, 0, 1, 1], bool), np.array([1, 1, 1, 0], bool))
      >>> gap, gap.value
      (Gap(lost=2, gained=1, images=4), 0.25)
    """
    return Gap(int(np.sum(than & ~attack)), int(np.sum(attack & ~than)), len(attack))


def gap_p_value(gap: Gap, margin: float) -> float:
    """Returns the probability of a gap at least as large, if the true one is ``margin``.

    With ``b`` images lost and ``c`` gained: ``P(B - C >= b - c)`` where ``(B, C, n - B - C)`` is multinomial
    with shares ``(q + margin, q, ...)``. ``q`` is the likeliest value under the hypothesis:
    ``q = (sqrt(u^2 + 8 n c margin (1 - margin)) - u) / 4 n`` with ``u = (2 n - b + c) margin - b - c``.

    Args:
      gap: what was found.
      margin: in [0, 1).

    Source: Tango (1998), Equivalence test and confidence interval for the difference in proportions for the
      paired-sample design (the likeliest ``q``); Lloyd (2008), Exact p-values for discrete models obtained by
      estimation and maximization (the probability).

    Example:
      >>> print(f"{gap_p_value(Gap(8, 0, 300), 0.01):.4f} {gap_p_value(Gap(8, 8, 300), 0.01):.2f}")
      0.0285 0.81
    """
    from scipy.stats import binom

    lost, gained, n = gap
    if not n:
        return 1.0
    linear = (2 * n - lost + gained) * margin - lost - gained
    root = np.sqrt(linear**2 + 8 * n * gained * margin * (1 - margin))
    q = float(np.clip((root - linear) / (4 * n), 0, (1 - margin) / 2))
    counts = np.arange(n + 1)
    share = min(1.0, (q + margin) / (1 - q))
    at_least = binom.sf(lost - gained + counts - 1, n - counts, share)
    return float(min(1.0, np.sum(binom.pmf(counts, n, q) * at_least)))


def share_p_value(count: int, images: int, margin: float) -> float:
    """Returns the probability of so many images or more, if their true share is ``margin``.

    Example:
      >>> print(f"{share_p_value(7, 300, 0.01):.4f} {share_p_value(0, 300, 0.0)}")
      0.0328 1.0
    """
    from scipy.stats import binom

    return float(binom.sf(count - 1, images, margin))


def mean_p_value(differences: np.ndarray) -> float:
    """Returns the probability of a mean at least as large, if the true one is 0: the one-sided t-test.

    It is exact for normal differences. If all are equal and above 0, it is that of their signs, ``2^-n``.

    Args:
      differences: one per image ``[n]``; 1.0 is returned for fewer than two.

    Example:
      >>> print(f"{mean_p_value(np.array([1.0, 2.0, 1.5, -0.5])):.4f}")
      0.0806
    """
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return 1.0
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / np.sqrt(n)
    if error > 0:
        return float(t.sf(mean / error, n - 1))
    return 0.5**n if mean > 0 else 1.0


def smallest_gap(images: int, margin: float, level: float) -> float:
    """Returns the smallest gap without gained images that ``images`` can show; 1 if none, or no images.

    Example:
      >>> print(" ".join(f"{smallest_gap(n, 0.02, LEVEL):.3f}" for n in (0, 20, 100, 300)))
      1.000 0.450 0.110 0.053
    """
    return next(
        (lost / images for lost in range(1, images + 1) if gap_p_value(Gap(lost, 0, images), margin) < level),
        1.0,
    )


def smallest_share(images: int, margin: float = 0.0, *, level: float) -> float:
    """Returns the smallest share that ``images`` can show to be above ``margin``; 1 if none, or no images.

    Without a margin a single image shows it: ``1 - level^(1 / n)``.

    Example:
      >>> print(" ".join(f"{smallest_share(n, level=LEVEL):.3f}" for n in (0, 20, 100, 300)))
      1.000 0.243 0.054 0.018
    """
    if not images:
        return 1.0
    if not margin:
        return 1 - level ** (1 / images)
    counts = (k / images for k in range(1, images + 1) if share_p_value(k, images, margin) < level)
    return next(counts, 1.0)
