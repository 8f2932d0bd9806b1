"""The commands of experiments/devices.md run, on four fake devices a process."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, with_devices
from flax.traverse_util import flatten_dict

from robal_jax import cli

PAGE = (ROOT / "experiments/devices.md").read_text()
LINES = PAGE.splitlines()
BASH = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command, folder, cache):
    """What a block prints; processes that it starts in the background print into it too."""
    done = subprocess.run(
        ["bash", "-euc", command.replace(".venv/bin/python", sys.executable)],
        cwd=folder,
        env=with_devices(4, JAX_COMPILATION_CACHE_DIR=str(cache)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.long
@pytest.mark.slow
def test_commands(tmp_path):
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    # Both processes end with status 0: ``wait`` alone does not say.
    blocks = [block.replace("\nwait\n", "\nfor job in $(jobs -p); do wait $job; done\n") for block in BASH]
    printed = [run(block, tmp_path, tmp_path / "cache") for block in blocks]
    one, devices, two, evaluated = printed
    assert one.splitlines()[-1].split(" sha256 ")[0].endswith("/checkpoints/10")
    assert devices.count("CpuDevice") == 4
    # All processes stopped by the signal to one; one process resumed from there, to the end.
    (stopped,) = re.findall(r"^stopped at step (\d+) of 100", two, re.MULTILINE)
    assert f"resuming at step {stopped} of 100" in two
    assert two.splitlines()[-1].split(" sha256 ")[0].endswith("/checkpoints/100")
    assert evaluated.count("report runs/devices/two/evaluation/report.html") == 1
    # One process with four devices and two with eight see the same images and take the same steps.
    runs = tmp_path / "runs/devices"
    single, double = losses(runs / "one"), losses(runs / "two")
    assert sorted(double) == list(range(5, 101, 5))
    for step, loss in single.items():
        assert double[step] == pytest.approx(loss, rel=1e-4)
    # What two processes leave is written once, and is what one process finds.
    assert len(list((runs / "two/tensorboard").iterdir())) == 2  # one file a start
    alone = "--workdir=runs/devices/two --folder=alone --autoattack=none --audit=0"
    run(f".venv/bin/python experiments/evaluate.py {alone}", tmp_path, tmp_path / "cache")
    found, expected = (np.load(f / "examples.npz") for f in (runs / "two/evaluation", tmp_path / "alone"))
    assert len(found["labels"]) == 700
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_what_is_written_as_a_field_is_one():
    config = cli.load_config(f"{ROOT}/configs/robal_n.py:cifar10_lt")
    known = set(flatten_dict(config.to_dict(), sep="."))
    named = set(re.findall(r"config\.((?:train|evaluation|data|schedule)\.\w+)", PAGE))
    assert named
    assert named <= known


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        page, _, heading = target.partition("#")
        assert (ROOT / "experiments" / page).exists()
        assert not heading or heading in [line.lower().lstrip("# ").replace(" ", "-") for line in LINES]
