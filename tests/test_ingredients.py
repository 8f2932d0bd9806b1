"""What makes robust training strong, by itself and all at once: averages, AWP, budgets, mixing, modes."""

import ingredients
import jax
import numpy as np

from robal_jax import averages, training
from robal_jax.storage import checkpoints
from robal_jax.training import step as training_step


def run(workdir, config):
    said = []
    path = training.train(config, workdir, say=said.append)
    return path, said[-1].split()[3]


def test_one_compilation_serves_a_run_with_everything_on(monkeypatch, tmp_path):
    original, traces = training.train_chunk, []
    monkeypatch.setattr(training_step, "train_chunk", lambda *a, **k: traces.append(1) or original(*a, **k))
    path, sha256 = run(tmp_path / "run", ingredients.get_config())
    assert len(traces) == 1
    found = checkpoints.read_latest(tmp_path / "run")
    assert found.path == path
    assert found.sha256 == sha256
    current, average = (averages.chosen(found.tree, which) for which in averages.WEIGHTS)
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), current["params"], average["params"])
    assert max(jax.tree.leaves(gaps)) > 1e-4
