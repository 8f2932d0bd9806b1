"""The Square Attack against AutoAttack's released code, in float64 and in float32: see parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoattack_net import network
from parity import FLOAT32, SINGLE, nchw, nhwc

from robal_jax.attacks import ThreatModel, square_attack

pytestmark = pytest.mark.parity


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "bound"), [("autoattack_trace_f64", SINGLE), ("autoattack_trace", FLOAT32)], ids=("f64", "f32")
)
def test_square(reference, file, bound):
    with jax.enable_x64(file.endswith("f64")):
        check = functools.partial(reference.check, "square attack", file)
        read = functools.partial(reference, file)
        chosen = read("idx")
        images = nhwc(reference("autoattack", "x")[chosen])
        labels = jnp.asarray(reference("autoattack", "y")[chosen])
        weights = {key for key in reference.load("autoattack") if key.startswith("net/")}

        # The released code draws a start per image, but one square and sign for all.
        stripes = np.moveaxis(read("square/draw_init"), 1, -1).reshape(len(images), -1)
        squares = np.column_stack([read(f"square/draw_{name}") for name in ("vh", "vw", "sign")])
        table = np.zeros((1 + len(squares), *stripes.shape))
        table[0] = stripes
        table[1:, :, : squares.shape[1]] = squares[:, None]
        counts = set()

        def draw(keys, number, count):
            counts.add(count)
            return jnp.asarray(table)[number, :, :count]

        search = functools.partial(
            square_attack.square_search,
            network({key: reference("autoattack", key) for key in weights}),
            threat=ThreatModel(float(read("eps"))),
            queries=len(squares),
            draw=draw,
        )
        found = jax.jit(search)(jax.random.split(jax.random.key(0), len(images)), images, labels)
        assert counts == {stripes.shape[1], squares.shape[1]}  # every given draw is used
        assert found.best.dtype == reference.load(file)["square/x_best"].dtype

        check("square/x_best", nchw(found.best), bound)
        check("square/margin", found.margin, bound)
        check("square/n_queries", found.queries_used, 0)
        check("square/queries_run", found.number - 1, 0)
    reference.assert_all_seen(file.removesuffix("_f64"), "square/")
