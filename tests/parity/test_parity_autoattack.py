"""The attacks of AutoAttack, and the ensemble, against three seeds of the reference implementation.

The reference draws other random numbers with each seed (but FAB-T draws none here), so its runs disagree on
some images. If ours is one more run of the same attack, then of the images on which one of ``n + 1`` runs
stands alone, it is ours in one of ``n + 1``, whatever the images are: a binomial test, which needs no
tolerance. It is made of the images that one run alone leaves right, and of those that one alone breaks.

Where runs of the reference differ, the test never sees a fault of four images or fewer, and a larger one
only if the others stand alone on few: with three runs, 5 of 5 images fail and 5 of 6 pass. Where they all
agree, three of the 200 images fail. The other files of this folder compare each attack step by step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoattack_net import network
from parity import nhwc
from scipy.stats import binom

from robal_jax.attacks import ThreatModel, autoattack

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.usefixtures("optimised")]

BATCH = 100

LEVEL = 1e-3
"""Of each of the fourteen tests."""

ROUNDED = 0.01
"""Share of images that rounding may decide, where all runs of the reference agree on all of them."""


@pytest.fixture(scope="module")
def attacked(reference):
    """``robust(version, upto)``: which images are right after the stage ``upto``, bool ``[200]``."""
    load = lambda key: reference("autoattack", key)  # noqa: E731
    images, labels = np.float32(nhwc(load("x"))), np.asarray(load("y"))
    threat = ThreatModel(float(load("eps")))
    logits_fn = jax.jit(network({key: np.float32(a) for key, a in reference.load("autoattack").items()}))
    clean = np.asarray(logits_fn(images))
    reference.check("autoattack", "autoattack", "clean_logits", clean, 1e-5)
    keys = jax.random.split(jax.random.key(0), len(images))

    @functools.cache
    def run(version):
        progress = autoattack.begin(labels, clean.argmax(-1))
        stages = autoattack.stages(version, 10, threat=threat)
        for stage in stages:
            step = jax.jit(lambda *args, stage=stage: stage.attack(logits_fn, *args))

            def attack(ids, number, step=step):
                batch = np.resize(ids, BATCH)
                found = step(keys[batch], images[batch], jnp.asarray(labels[batch]), jnp.int32(number))
                return np.asarray(found)[: len(ids)], np.asarray(logits_fn(found)).argmax(-1)[: len(ids)]

            for _ in autoattack.run(stage, attack, labels, progress, size=BATCH):
                pass
            assert step._cache_size() == 1
        return stages, progress

    def robust(version, upto):
        stages, progress = run(version)
        return ~autoattack.broken_by(progress, stages[upto].last)

    return robust


@pytest.mark.parametrize(
    ("name", "version", "upto"),
    [
        ("apgd-dlr", "apgd_dlr", 0),
        ("apgd-t", "apgd_t", 0),
        ("fab-t", "fab_t", 0),
        ("square", "square", 0),
        ("apgd-ce", "standard", 0),  # the ensemble's first stages, which nothing stands before
        ("robal_pair", "standard", 1),
        ("standard", "standard", 3),
    ],
)
def test_robust_accuracy(reference, attacked, name, version, upto):
    keys = sorted(key for key in reference.load("autoattack") if key.endswith(f"/{name}/robust"))
    theirs = [reference("autoattack", key) for key in keys if key.startswith("seed")]
    ours = attacked(version, upto)
    print(f"{name}: ours {ours.mean():.3f}, theirs {[float(robust.mean()) for robust in theirs]}")
    runs = np.stack([ours, *theirs])
    assert len(runs) > 2
    if (runs[1:] == runs[1]).all():
        assert np.mean(ours != runs[1]) <= ROUNDED
        return
    for right in (True, False):
        alone = (runs == right).sum(0) == 1
        count, mine = int(alone.sum()), int(np.sum(alone & (ours == right)))
        chance = binom.sf(mine - 1, count, 1 / len(runs))
        done = "left right" if right else "broken"
        print(f"{count} images are {done} by one run alone, {mine} of them by ours: p {chance:.3f}")
        assert chance > LEVEL
