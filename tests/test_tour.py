"""The notebook runs from its first cell to its last, and what it says comes out."""

import contextlib
import io
import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import robal_jax

TOUR = ROOT / "experiments" / "tour.ipynb"


def texts(notebook):
    """Returns the texts that the code cells print."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def figures(text):
    """The number after each name of a condition: 'pgd_20 74.0'."""
    return {name: float(number) for name, number in re.findall(r"(\w+) (\d+\.\d)", text)}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's packages
@pytest.mark.usefixtures("optimised")
def test_the_tour(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    stored = nbformat.read(TOUR, 4)
    made = nbformat.from_dict(stored.copy())
    client = NotebookClient(made, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    audit = next(text for text in texts(made) if "saturated" in text)
    honest, masked = (
        figures(line) for line in audit.splitlines() if line.startswith(("as it is", "saturated"))
    )
    assert masked["pgd_20"] > honest["pgd_20"] + 10
    assert abs(masked["robal_aa"] - honest["robal_aa"]) <= 2
    first, second = audit.split("saturated:")
    assert "flagged" not in first and "flagged: Zero gradients" in second
    (compared,) = (text for text in texts(made) if "difference to AT" in text)
    shares = re.findall(r"^(.+), (all|tail): (\d+\.\d) % survive", compared, re.MULTILINE)
    assert [name for name, group, _ in shares if group == "tail"] == ["AT", "RoBal-N", "My method"]
    assert all(20 < float(share) < 95 for *_, share in shares)


def test_the_tour_is_stored_with_its_outputs():
    notebook = nbformat.read(TOUR, 4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in notebook.cells))
    )
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert TOUR.stat().st_size < 500_000


def test_what_the_tour_says_of_the_cards_is_in_them():
    """The last code cell, run again, prints what is stored."""
    cell = [cell for cell in nbformat.read(TOUR, 4).cells if cell.cell_type == "code"][-1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(cell.source, {"robal_jax": robal_jax})
    assert "cifar10_lt" in cell.source
    assert printed.getvalue() == "".join(output["text"] for output in cell.outputs)
