"""Several devices give the numbers of one, whichever way they are used."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import json, sys
from functools import partial
import jax, numpy as np
from robal_jax import build, cli, parallel, train

def two_steps(layout, devices):
    config = cli.load_config(f"{sys.argv[1]}/configs/robal_n.py:digits_lt")
    config = cli.apply_overrides(config, [f"--config.train.layout={layout}", "--config.train.crop_flip=true"])
    job = build.training(config)
    jax.local_devices = lambda: devices
    chunk = train.compiled_chunk(job)
    ids, _ = train.chunk_ids(job, 0)
    data = train.DeviceData(job.data.train_images, job.data.train_labels)
    positions = jax.numpy.arange(job.batch_size)
    return jax.device_get(chunk(train.initial_state(job), data, ids, 2, jax.random.key(0), positions))

devices = jax.devices()
one = two_steps("jit", devices[:1])
for layout in parallel.LAYOUTS:
    many = two_steps(layout, devices)
    gap = max(float(np.max(np.abs(a - b))) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)))
    print(json.dumps([layout, len(devices), int(many[0].step), gap]))
"""


@pytest.fixture(scope="module")
def gaps():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(ROOT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("layout", ["jit", "pmap"])
def test_four_devices_equal_one(gaps, layout):
    (found,) = [row for row in gaps if row[0] == layout]
    assert found[1:3] == [4, 2]
    # Only the order of float32 sums over the batch differs: a few ulp of the sums' largest value, 14 (2^-20).
    assert found[3] < 16 * 2.0**-20
