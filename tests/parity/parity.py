"""What the parity tests share: the released code's numbers, and the tally of what was compared with them.

Our numbers are held against those that the released PyTorch code made, in float64. The folder of the
released code's numbers says what each array is (README.md); a table of what was compared and how well it
agrees is printed at the end (``pytest -m parity``). The error of an array is
``max |ours - theirs| / max |theirs|``; of an array of checksums, one row per tensor, the worst row's.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robal_jax import models, pytorch
from robal_jax.attacks import ThreatModel
from robal_jax.models import convolutions

# One function, or one pass through a network and its gradient: float64 rounding (1e-16) grows by the number
# of summands and layers to 1e-15 .. 1e-12. A wrong constant (an epsilon, a biased variance) shows at 1e-5.
SINGLE = 1e-9
# Three training steps multiply that by about 100; a RoBal step shows the 1e-12 that the released code adds
# to a probability before its logarithm, divided by that probability: about 1e-11.
# An image that is stored in float32 only: a few roundings of 6e-8, where the released float32 run made the
# same steps as the float64 one.
FLOAT32 = 1e-6

# Of the attacked and the trained networks.
BACKBONE = models.WideResNet(10, 1, convolution=convolutions.cpu_convolution)
EPSILON, STEP = 0.031, 0.0078
THREAT = ThreatModel(EPSILON)


class Reference:
    """The files of the released code's numbers, and the tally of what was compared with them."""

    def __init__(self, load):
        self.load = functools.cache(lambda name: dict(load(name)))
        self.files = collections.defaultdict(lambda: {"compared": set(), "input": set()})
        self.groups = collections.defaultdict(dict)
        self.ran = set()

    def pytest_runtest_logreport(self, report):
        """Notes which tests ran in this process, whose tally this is."""
        self.ran.add(report.nodeid)

    def skip_unless_all_ran(self, request):
        """Skips a test that looks at what the others of its file compared, if these ran elsewhere."""
        others = {item.nodeid for item in request.session.items if item.path == request.path}
        others -= {request.node.nodeid}
        if not others or others - self.ran:
            pytest.skip(
                "not all tests of this file ran in this process; pytest -m parity runs them all in one"
            )

    def __call__(self, file, key):
        """An array that we read."""
        self.files[file]["input"].add(key)
        return self.load(file)[key]

    def check(self, group, file, key, ours, bound=SINGLE, rows=..., theirs=None):
        """Compares an array that we make; ``theirs`` if it is not the stored one but follows from it."""
        theirs = self.load(file)[key][rows] if theirs is None else theirs
        theirs, ours = np.asarray(theirs, float), np.asarray(ours, float)
        assert ours.shape == theirs.shape, key
        per_row = "checksum" in key and theirs.ndim == 2
        size = np.abs(theirs).max(axis=1, keepdims=True) if per_row else np.abs(theirs).max()
        error = np.max(np.abs(ours - theirs) / np.where(size > 0, size, 1.0))
        self.files[file]["compared"].add(key)
        self.groups[group][f"{file}:{key}"] = error
        assert error <= bound, f"{file}:{key}: {error:.1e} > {bound:.0e}"

    def same_steps(self, name, key, count):
        """Which entries of the images made the same first steps in the released float32 and float64 runs.

        How many these are is a property of those runs: float32 rounds the signs of small gradients away.
        """
        single, double = (self.load(file)[key][:count] for file in (name, f"{name}_f64"))
        return (single == double).all(axis=0)

    def assert_all_seen(self, name, prefix):
        """No array of these names is forgotten, neither in float64 nor of those in float32 only."""
        for file in name, f"{name}_f64":
            forgotten = self.stored(file) - self.files[file]["compared"] - self.files[file]["input"]
            assert not {key for key in forgotten if key.startswith(prefix)}

    def stored(self, file):
        """The arrays of a file; of a float32 file only those that the one of float64 beside it leaves out."""
        twin = f"{file}_f64"
        return set(self.load(file)) - (set(self.load(twin)) if twin in self.files else set())

    def pytest_terminal_summary(self, terminalreporter):
        """The table; pytest calls this at the end (in one process: workers of pytest-xdist print nothing)."""
        say = terminalreporter.write_line
        terminalreporter.section("parity with the released code, float64")
        say(f"{'group':<32}{'arrays':>8}{'largest relative error':>24}")
        for group, errors in self.groups.items():
            worst = max(errors, key=errors.get)
            say(f"{group:<32}{len(errors):>8}{errors[worst]:>24.1e}  {worst}")
        for file, seen in self.files.items():
            stored, compared = self.stored(file), seen["compared"]
            only_read = len(stored & seen["input"] - compared)
            compared, untouched = len(stored & compared), len(stored - compared - seen["input"])
            what = f"{len(stored)} arrays" + (
                " that are float32 only" if len(stored) < len(self.load(file)) else ""
            )
            say(f"{file}: {what}, {compared} compared, {only_read} only read, {untouched} not touched")


def nhwc(x):
    return jnp.asarray(np.moveaxis(np.asarray(x, float), -3, -1))


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def imported(recipe, name, model, prefixes=None):
    """Parameters and statistics of one of the released code's networks, float64."""
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), float))
    weights = {key: np.asarray(value, float) for key, value in recipe.net_state(name).items()}
    return pytorch.from_state_dict(weights, *like, prefixes)


def checksums(recipe, arrays, names):
    return np.stack([recipe.checksum(arrays[name]) for name in names])
