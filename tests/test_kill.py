"""A run that is killed or stopped, and started again, loses nothing.

``ROBAL_KILLS`` and ``ROBAL_STOPS`` say how many times, by default a few; ``ROBAL_KILLED`` may be 'everything'
for the run with all ingredients in place of RoBal-N's on the digits.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

from experiments.benchmarks.layouts import Layout, start
from robal_jax.storage import checkpoints

KILLS, STOPS = int(os.environ.get("ROBAL_KILLS", "2")), int(os.environ.get("ROBAL_STOPS", "1"))
EPOCHS = 6
ONE, TWO = Layout("jit", 1), Layout("jit", 2)


def arguments(workdir, epochs=EPOCHS):
    if os.environ.get("ROBAL_KILLED") == "everything":
        config, steps = f"{ROOT}/tests/ingredients.py:trades", f"--config.train.epochs={epochs}"
        return [f"--config={config}", f"--workdir={workdir}", steps]
    return [
        f"--config={ROOT}/configs/robal_n.py:digits_lt",
        f"--workdir={workdir}",
        f"--config.train.epochs={epochs}",
        "--config.schedule.milestones=(3,5)",
        "--config.attack.steps=2",
        "--config.train.checkpoint_epochs=1",  # so that many kills fall into a save
    ]


@pytest.fixture(scope="module")
def env(tmp_path_factory, optimised):
    """The compilation cache only makes the restarts faster; what is compiled is the same.

    In float64, because on two devices a sign of a gradient that is 0 but for its rounding may flip: that was
    seen to move parameters by 3e-3 in float32.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compilations")),
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": f"{ROOT}/tests",  # of the config with everything
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory, env):
    """The last checkpoint of a run that nobody disturbed."""
    return finish(tmp_path_factory.mktemp("uninterrupted") / "run", env)[1]


def finish(workdir, env, layout=ONE):
    """Trains to the end; what was said, and the last checkpoint's sha256 and arrays."""
    (process,) = start(layout, arguments(workdir), **env)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    found = checkpoints.read_latest(workdir)
    assert out.splitlines()[-1] == f"checkpoint {found.path} sha256 {found.sha256}"
    assert found.path.name == str(EPOCHS * 5)
    return out, found


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.002)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def saving(workdir):
    """Whether a checkpoint lies there under its temporary name."""
    return any("tmp" in path.name for path in workdir.glob("checkpoints/*"))


def largest_difference(one, other):
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a.astype(float) - b)), one.tree, other.tree)
    return float(np.max(jax.tree.leaves(gaps)))  # NaN if there is any


@pytest.mark.long
@pytest.mark.slow
def test_killed_runs_end_with_the_same_digest(tmp_path, capsys, env, expected):
    generator = random.Random(0)
    in_save = early = elsewhere = exact = 0
    gap = 0.0
    for i in range(KILLS):
        workdir = tmp_path / str(i)
        (process,) = start(ONE, arguments(workdir), **env)
        # The first kill, and every second one, comes as soon as a save is seen, from a random epoch on.
        epoch = generator.randrange(EPOCHS)
        wait_for(process, lambda log=workdir / "metrics.jsonl", epoch=epoch: lines(log) > epoch)
        if i % 2:
            time.sleep(generator.uniform(0.0, 0.2))
        else:
            wait_for(process, lambda workdir=workdir: saving(workdir))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        early += process.returncode == -signal.SIGKILL
        in_save += saving(workdir)
        if i % 3 == 1:  # resumes on other devices
            _, found = finish(workdir, env, TWO)
            elsewhere, gap = elsewhere + 1, float(np.maximum(gap, largest_difference(expected, found)))
        else:
            _, found = finish(workdir, env)
            exact += found.sha256 == expected.sha256
        shutil.rmtree(workdir)
    with capsys.disabled():
        print(
            f"\n{KILLS} kills, {early} before the end, {in_save} during a save; resumed on the same layout: "
            f"{exact} of {KILLS - elsewhere} bit-identical; on two devices: {elsewhere}, largest difference "
            f"{gap:.1e}"
        )
    assert early  # some kill must have come before the end
    assert exact == KILLS - elsewhere
    # Sums are rounded in another order, 2^-53 each time, over thirty steps; a step left out would be 1e-3.
    assert gap < 1e-11


@pytest.mark.long
@pytest.mark.slow
def test_stopped_runs_end_with_the_same_digest(tmp_path, capsys, env, expected):
    generator, seconds, steps = random.Random(1), [], []
    for i in range(STOPS):
        workdir = tmp_path / str(i)
        (process,) = start(ONE, arguments(workdir), **env)
        if i % 3:
            epoch = generator.randrange(EPOCHS)
            wait_for(process, lambda log=workdir / "metrics.jsonl", epoch=epoch: lines(log) >= epoch)
        else:  # while it compiles
            wait_for(process, lambda workdir=workdir: (workdir / "config.json").exists())
            time.sleep(generator.uniform(0.0, 1.0))
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate()
        seconds.append(time.monotonic() - asked)
        assert process.returncode == 0, errors
        said = re.search(r"stopped at step (\d+) of 30; the same command resumes from there", out)
        assert said or f"checkpoints/{EPOCHS * 5} " in out
        steps.append(checkpoints.steps(workdir / "checkpoints")[-1])
        assert not said or steps[-1] == int(said[1])
        assert finish(workdir, env)[1].sha256 == expected.sha256
    with capsys.disabled():
        print(
            f"\n{STOPS} times SIGTERM: status 0 after at most {max(seconds):.1f} s "
            f"({' '.join(f'{s:.1f}' for s in seconds)}), saved at steps {steps}; all ended with the same "
            "digest"
        )
    assert max(seconds) < 30


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_full_disk(tmp_path, capsys, env):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        ballast, workdir = disk / "ballast", disk / "run"
        ballast.write_bytes(bytes(5 * 2**19))
        command = [*arguments(workdir), "--config.train.keep_checkpoints=100"]
        (process,) = start(ONE, command, **env)
        _, errors = process.communicate()
        kept = checkpoints.steps(workdir / "checkpoints")
        assert process.returncode == 2
        usual = ("train ", "warning: JAX_ENABLE_X64=1")
        said = [line for line in errors.splitlines() if not line.startswith(usual)]
        assert len(said) == 1, said
        (error,) = said
        assert error.startswith(f"error: disk full: a checkpoint in {workdir}/checkpoints takes ")
        assert kept
        assert kept == [5 * (i + 1) for i in range(len(kept))]
        for step in kept:
            checkpoints.read(workdir / "checkpoints" / str(step))  # whole
        ballast.unlink()
        (process,) = start(ONE, arguments(workdir), **env)
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        assert out.startswith(f"resuming at step {kept[-1]} of {EPOCHS * 5} ")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    with capsys.disabled():
        print(f"\nfull disk: {error!r}; kept {kept}")
