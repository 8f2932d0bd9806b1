"""Strict JAX for every test, and the fixtures that several test files share."""

import contextlib
import functools
import gc
import importlib.metadata
import os
import pathlib
import sys
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One module per program, and the older emitters, which jaxlib 0.10 has, halve the time of a compilation.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import numpy as np
import pytest

from robal_jax.devices.cpu import prepare_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The tests and the scripts that they start share what they compile, and the next test run finds it again.
SETTINGS = {"XDG_CACHE_HOME": str(ROOT / ".pytest_cache")}
prepare_jax(SETTINGS)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", SETTINGS["JAX_COMPILATION_CACHE_DIR"])
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

OPTIMISED = os.environ["XLA_FLAGS"]
UNOPTIMISED = f"{OPTIMISED} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

jax.config.update("jax_numpy_rank_promotion", "raise")


def with_devices(count, **more):
    """The environment of a process that sees ``count`` CPU devices, and more variables."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags, **more}


collect_ignore = ["twins.py"]  # needs PyTorch, and has no doctest


# Files with the longest tests come first, so that no worker begins one when all others are done.
LONGEST = (
    "test_readme",
    "test_tour",
    "test_calibration",
    "test_devices_page",
    "test_tables",
    "test_parallel",
)


def pytest_collection_modifyitems(config, items):
    """Skips long tests unless ``-m`` asks for them, and puts the files with the longest ones first."""
    asked = config.getoption("markexpr")
    for item in items:
        wanted = "long" in asked or ("parity" in asked and item.get_closest_marker("parity"))
        if item.get_closest_marker("long") and not wanted:
            item.add_marker(pytest.mark.skip(reason="a long test; pytest -m long runs it"))
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.stem) in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """Spares the garbage collector a look at modules and tests, which live to the end, and seldom runs it.

    JAX makes so many objects when it traces that the collector takes some percent of the time otherwise.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def unoptimised():
    """XLA does not optimise, here and in the processes that tests start.

    Most programs run once or twice, so that optimising them takes longer than it saves.
    """
    jax.devices()  # XLA reads its flags once
    jax.config.update("jax_disable_most_optimizations", True)
    with mock.patch.dict(os.environ, XLA_FLAGS=UNOPTIMISED):
        yield


@pytest.fixture(autouse=True)
def environment():
    """What a test sets for JAX is its own: processes that later tests start would compile otherwise."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def golden_dir():
    """Folder of the numbers made by the released code; skips where it is not at hand."""
    folder = pathlib.Path(os.environ.get("ROBAL_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set ROBAL_GOLDEN_DIR to that of the released code's numbers")
    return folder


@pytest.fixture(scope="session")
def golden(golden_dir):
    """``golden(name)``: one file of that folder, arrays by name; skips where it is missing."""

    def load(name):
        file = golden_dir / f"{name}.npz"
        if not file.is_file():
            pytest.skip(f"no {file}; set ROBAL_GOLDEN_DIR to the folder of the released code's numbers")
        return np.load(file)

    return load


@pytest.fixture(scope="session")
def recipe(golden_dir):
    """The module ``recipe`` of that folder: rebuilds the weights and inputs behind the numbers."""
    sys.path.insert(0, str(golden_dir))
    sys.dont_write_bytecode = True
    try:
        import recipe
    finally:
        sys.path.remove(str(golden_dir))
    return recipe


@pytest.fixture(scope="session")
def reference(golden, request):
    """The released code's numbers and the tally of what was compared with them."""
    from parity import Reference  # of tests/parity/, where all who ask for it lie

    reference = Reference(golden)
    request.config.pluginmanager.register(reference)
    return reference


@pytest.fixture(scope="module")
def optimised(unoptimised):
    """XLA optimises a little, here and in the processes that are started: for programs that run long."""
    with mock.patch.dict(os.environ, XLA_FLAGS=OPTIMISED):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def float64(optimised):
    """JAX computes in float64, in which convolutions are slow if XLA does not optimise."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def digits_once():
    """scikit-learn's file of digits is read once; whoever asks gets the same arrays, and copies them."""
    from sklearn import datasets

    with mock.patch.object(datasets, "load_digits", functools.cache(datasets.load_digits)):
        yield


DRAWN = {}
"""The functions that draw, by name."""


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Reports are written without drawing, which takes most of the time of a short evaluation."""
    from robal_jax.reporting import figures

    DRAWN.update(png=figures.png, svg=figures.svg)
    with mock.patch.multiple(figures, png=lambda figure: b"png", svg=lambda figure: b"svg"):
        yield


@contextlib.contextmanager
def drawing():
    """Reports that are written inside are drawn."""
    from robal_jax.reporting import figures

    with mock.patch.multiple(figures, **DRAWN):
        yield


@pytest.fixture
def drawn():
    """Reports are drawn."""
    with drawing():
        yield
