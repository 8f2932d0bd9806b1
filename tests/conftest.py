"""Fixtures that several test files share."""

import os
import pathlib

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden():
    """Numbers of the released code by file name; skips where they are not at hand."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = pathlib.Path(os.environ.get("ROBAL_GOLDEN_DIR", default))

    def load(name):
        file = folder / f"{name}.npz"
        if not file.is_file():
            pytest.skip(f"no {file}; set ROBAL_GOLDEN_DIR to the folder of the released code's numbers")
        return np.load(file)

    return load
