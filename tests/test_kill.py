"""A run that is killed without warning, and started again, ends with the uninterrupted run's bits."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

KILLS = int(os.environ.get("ROBAL_KILLS", "3"))


def command(workdir):
    return [
        sys.executable,
        str(ROOT / "experiments/train.py"),
        f"--config={ROOT}/configs/robal_n.py:digits_lt",
        f"--workdir={workdir}",
        "--config.train.epochs=12",
        "--config.schedule.milestones=(9,11)",
        "--config.train.checkpoint_epochs=1",  # so that many kills fall into a save
    ]


def finish(workdir, env):
    done = subprocess.run(command(workdir), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split("sha256 ")[1]


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.002)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def saving(workdir):
    """Whether a checkpoint lies there under its temporary name."""
    return any("tmp" in path.name for path in workdir.glob("checkpoints/*"))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_digest(tmp_path, capsys):
    # The compilation cache only makes the restarts faster; what is compiled is the same.
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    expected = finish(tmp_path / "uninterrupted", env)
    generator = random.Random(0)
    in_save = early = 0
    for i in range(KILLS):
        workdir = tmp_path / str(i)
        process = subprocess.Popen(
            command(workdir), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Every second kill comes as soon as a save is seen under way, from a random epoch on.
        epoch = generator.randrange(12)
        wait_for(process, lambda log=workdir / "metrics.jsonl", epoch=epoch: lines(log) > epoch)
        if i % 2:
            wait_for(process, lambda workdir=workdir: saving(workdir))
        else:
            time.sleep(generator.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        early += process.wait() == -signal.SIGKILL
        in_save += saving(workdir)
        assert finish(workdir, env) == expected
    assert early  # some kill must have come before the end
    with capsys.disabled():
        print(f"\n{KILLS} kills, {early} before the end, {in_save} during a save: all ended with {expected}")
