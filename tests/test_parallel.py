"""Several devices give the numbers of one, whichever way they are used (robal_jax.parallel).

Several processes: test_streaming.py (pmap), test_devices_page.py (jit); all layouts, in float64:
experiments/benchmarks/layouts.py.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, with_devices

from robal_jax import builder, cli, training
from robal_jax.devices import parallel
from robal_jax.errors import InputError

# float64's resolution 2^-52 times what grows it: sums over a batch of values up to 14, eight updates, and
# batch norm's division by small standard deviations. Statistics of a part show at 1e-3.
BOUND = 1e-11


# ---------------------------------------------------------------- parts of a batch, on four devices

SCRIPT = """
import json, sys
import jax, numpy as np
from robal_jax import builder, cli, training
from robal_jax.devices import parallel

def two_steps(layout, count, *overrides):
    config = cli.load_config(f"{sys.argv[1]}/configs/robal_n.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width, config.attack.steps = (4, 4, 4), 16, 2
    settings = (f"layout={layout}", "augmentation=crop_flip", "steps_per_dispatch=2", *overrides)
    job = builder.training(cli.apply_overrides(config, [f"--config.train.{setting}" for setting in settings]))
    devices = jax.devices()[:count]
    data = training.Examples(job.data.train_images, job.data.train_labels)
    state, data, key = parallel.replicate((training.initial_state(job), data, jax.random.key(0)), devices)
    chunk, (ids, _) = training.compiled_chunk(job, devices), next(training.chunks(job, 0))
    state, sums = jax.device_get(chunk(state, data, ids, 2, key, training.positions(job)))
    return state.params, state.stats, sums

def gap(one, other):
    differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one, other)
    return float(np.max(jax.tree.leaves(differences)))  # NaN if there is any

own = "sync_batch_norm=False"
whole = two_steps("jit", 1)
parts = two_steps("jit", 1, "accumulation_steps=4")
print(json.dumps({
    "whole batch on four, jit": gap(whole, two_steps("jit", 4)),
    "whole batch on four, pmap": gap(whole, two_steps("pmap", 4)),
    "four parts on one, each device its own on four, jit": gap(parts, two_steps("jit", 4, own)),
    "four parts on one, each device its own on four, pmap": gap(parts, two_steps("pmap", 4, own)),
    "the same, two by two": gap(parts, two_steps("pmap", 2, own, "accumulation_steps=2")),
    "four parts, in common on two": gap(parts, two_steps("jit", 2, "accumulation_steps=4")),
    "parts are not the whole": gap(whole, parts),
}))

"""
ATTACK = """
import json
from functools import partial
import jax, numpy as np
from robal_jax import attacks
from robal_jax.devices import parallel

rng, traces = np.random.RandomState(0), []
images, labels = rng.rand(8, 4, 4, 1).astype(np.float32), np.arange(8) % 3
weight, keys = rng.randn(16, 3).astype(np.float32), jax.random.split(jax.random.key(1), 8)

def predict(weight, images):
    traces.append(1)
    return images.reshape(len(images), -1) @ weight

pgd = partial(attacks.pgd, threat=attacks.ThreatModel(0.1), steps=5, step_size=0.025)
expected = pgd(partial(predict, weight), keys, images, labels)
for layout in parallel.LAYOUTS:
    attack = parallel.attack(predict, pgd, layout=layout)
    del traces[:]
    found, traced = [], []
    for _ in range(2):
        found.append(np.asarray(attack(weight, keys, images, labels)))
        traced.append(len(traces))
    gaps = [float(np.max(np.abs(a - b))) for a, b in ((expected, found[0]), found)]
    try:
        attack(weight, keys[:7], images[:7], labels[:7])
        said = "nothing"
    except ValueError as error:
        said = str(error).removeprefix(f"7 images for {len(jax.devices())} devices; pass a multiple of ")
    print(json.dumps([len(jax.devices()), *gaps, *traced, said]))
"""


SEVERAL_STEPS = """
import dataclasses, json, sys
sys.path.insert(0, f"{sys.argv[1]}/tests")
import follow_ups, ingredients, jax, numpy as np
from robal_jax import builder, training
from robal_jax.devices import parallel

def seven_steps(job, layout, count):
    devices = jax.devices()[:count]
    data = training.Examples(job.images, job.labels)
    state, data, key = parallel.replicate((training.initial_state(job), data, jax.random.key(0)), devices)
    own = dataclasses.replace(job, settings=job.settings._replace(layout=layout))
    chunk, chunks, losses = training.compiled_chunk(own, devices), training.chunks(job, 0), []
    for ids, made in [next(chunks) for _ in range(4)]:
        state, sums = jax.device_get(chunk(state, data, ids, made, key, training.positions(job)))
        losses.append(sums["loss"])
    return {**vars(state), "opt_state": (), "losses": losses}

def gap(one, other):
    differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one, other)
    return float(np.max(jax.tree.leaves(differences)))  # NaN if there is any

"""
EVERYTHING = (
    SEVERAL_STEPS
    + """
job = builder.training(ingredients.get_config())
one = seven_steps(job, "jit", 1)
print(json.dumps({layout: gap(one, seven_steps(job, layout, 4)) for layout in parallel.LAYOUTS}))
"""
)
LEARNING = (
    SEVERAL_STEPS
    + """
for method in ("robustlt_reat",):
    job = builder.training(follow_ups.get_config(method))
    one, two = seven_steps(job, "jit", 1), seven_steps(job, "pmap", 2)
    first = jax.device_get(training.initial_state(job))
    moved = [bool(np.any(one["classes"][name] != first.classes[name])) for name in first.classes]
    print(json.dumps([method, gap(one, two), moved]))
"""
)


def said(script):
    env = with_devices(4, PYTHONPATH=str(ROOT), JAX_ENABLE_X64="1")
    command = [sys.executable, "-W", "error", "-c", script, str(ROOT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.slow
def test_the_parts_of_a_batch_may_lie_on_any_devices():
    (gaps,) = said(SCRIPT)
    assert gaps.pop("parts are not the whole") > 1e-3
    assert len(gaps) == 6
    for what, gap in gaps.items():
        assert gap < BOUND, what


@pytest.mark.long
@pytest.mark.slow
def test_everything_at_once_on_any_devices():
    """Averages, AWP, radii that are learned, mixed images: seven steps, into the second epoch."""
    (gaps,) = said(EVERYTHING)
    for layout, gap in gaps.items():
        assert gap < BOUND, layout


@pytest.mark.long
@pytest.mark.slow
def test_what_is_learned_of_the_classes_on_any_devices():
    """Losses and statistics of the whole batch, and radii from them: seven steps, into the second epoch.

    TAET, CFA and DAFA: experiments/benchmarks/layouts.py with ``follow_ups``; HARL: test_followup_losses.py.
    """
    found = said(LEARNING)
    assert len(found) == 1
    for method, gap, moved in found:
        assert gap < BOUND, method
        assert all(moved), method


@pytest.mark.slow
def test_an_attack_by_itself():
    found = said(ATTACK)
    assert len(found) == len(parallel.LAYOUTS)
    for devices, from_plain, from_again, *traced, refusal in found:
        assert devices == 4
        assert refusal == "their number"
        assert from_plain < 1e-6  # float32 images
        assert from_again == 0
        assert traced[0] == traced[1] > 0


# ---------------------------------------------------------------- what each process feeds


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_an_epoch(monkeypatch, processes, accumulation):
    config = cli.load_config("configs/at.py:digits_lt")
    job = builder.training(cli.apply_overrides(config, [f"--config.train.accumulation_steps={accumulation}"]))
    whole = [training.step_ids(job, step) for step in range(job.steps_per_epoch)]
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    ids, positions = [], []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows, count = next(training.chunks(job, 0))
        assert count == job.steps_per_epoch == 5
        ids.append(rows[:count])
        positions.append(training.positions(job))
    np.testing.assert_array_equal(np.concatenate(ids, axis=-1), whole)
    everyone = np.concatenate([shown.ravel() for shown in ids])
    assert len(set(everyone)) == len(everyone) == 5 * 64  # nobody's is another's
    assert sorted(np.concatenate([x.ravel() for x in positions])) == list(range(64))
    # Who stands where in the batch is the same for all numbers of processes.
    np.testing.assert_array_equal(np.concatenate(positions, axis=-1), np.arange(64).reshape(accumulation, -1))


def test_a_batch_that_cannot_be_spread(tmp_path):
    config = cli.load_config("configs/at.py:digits_lt")
    config = cli.apply_overrides(config, ["--config.train.accumulation_steps=3"])
    with pytest.raises(InputError, match=r"batch_size is 64; .*1, times config.train.accumulation_steps, 3"):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
