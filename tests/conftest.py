"""Strict JAX for every test, and the fixtures that several test files share."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs of the tests run once or twice, so that XLA's optimisation takes longer than it saves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from parity import Reference

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def compilations_of_scripts(tmp_path_factory):
    """The scripts that tests start share what they compile, and leave the user's own cache alone."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compilations_of_scripts"))
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
    reference = Reference(golden)
    request.config.pluginmanager.register(reference)
    return reference


@pytest.fixture(scope="module")
def float64():
    """JAX computes in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def compilations_are_kept(tmp_path_factory):
    """Runs and evaluations of one config trace anew, but XLA compiles them once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compilations"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield
