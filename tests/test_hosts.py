"""Signals that ask a run to stop, and several processes as one job (robal_jax.hosts).

Whole runs and evaluations of two processes: test_devices_page.py.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, with_devices

from experiments.benchmarks.layouts import finish, free_port
from robal_jax.devices import hosts
from robal_jax.errors import InputError

# ---------------------------------------------------------------- one process


def test_a_signal_asks_every_loop_around():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.stop_signals() as outer:
        with hosts.stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner
            assert outer
        with hosts.stop_signals() as another:
            assert not another  # it was not there then
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_interrupt_stops_at_once():
    with hosts.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("", "2", "0"), "need --coordinator"),
        (("127.0.0.1:1", "", ""), "needs --processes=N and --process=I"),
        (("127.0.0.1:1", "two", "0"), "needs --processes=N and --process=I"),
        (("127.0.0.1:1", "2", "2"), r"--process=2 is out of range; give 0\.\.1"),
    ],
)
def test_flags_that_do_not_fit(arguments, said):
    with pytest.raises(InputError, match=said):
        hosts.start(*arguments)


def test_alone_all_is_done_here():
    hosts.start("")
    assert hosts.is_first()
    assert hosts.by_first(lambda: 7) == 7
    assert hosts.only_first(lambda: 8) == 8


def test_processes_that_have_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 4)
    for begin in (lambda: hosts.start(""), hosts.stop_signals().__enter__):
        with pytest.raises(
            InputError, match=r"one of 4 processes that have not joined; add --coordinator=auto"
        ):
            begin()


CACHE = """
import os, jax, jax.numpy as jnp
from robal_jax.devices import hosts
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hosts.seen_by_all = lambda folder: False
count = lambda: len(os.listdir(os.environ["JAX_COMPILATION_CACHE_DIR"]))
found = []
for alone in (False, True):
    hosts._check_cache(alone=alone)
    jax.jit(lambda x: jnp.sin(x) + alone)(1.0)
    found.append(count())
assert 0 < found[0] == found[1], found
"""


@pytest.mark.slow
def test_a_cache_that_is_not_shared_is_left_alone_on_gpus(tmp_path):
    """Also if programs have been compiled before, as those are that look at the folder."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CACHE]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stderr.splitlines() if line.startswith("warning"))
    assert "are kept for the first one only; name a folder that all hosts share" in first
    assert "are not kept; name a folder" in second


# ---------------------------------------------------------------- two processes

SCRIPT = """
import json, pathlib, sys
from robal_jax import builder, cli, training
from robal_jax.storage import checkpoints
from robal_jax.devices import hosts
from robal_jax.errors import InputError
hosts.start(*sys.argv[1:4])
import jax, numpy as np
from robal_jax.devices import parallel

ran, found = [], {"devices": [jax.device_count(), jax.local_device_count()], "first": hosts.is_first()}
found["told"] = hosts.by_first(lambda: ran.append(1) or {"a": np.arange(3)})["a"].tolist()
try:
    hosts.by_first(lambda: (_ for _ in ()).throw(InputError("no such thing")))
except InputError as error:
    found["error"] = str(error)
try:
    hosts.by_first(lambda: {}["no such key"])
except (KeyError, RuntimeError) as error:
    found["fault"] = repr(error)
hosts.PIECE = 1000
found["long"] = hosts.by_first(lambda: bytes(range(256)) * 11) == bytes(range(256)) * 11
apart = f"{sys.argv[4]}-of-{jax.process_index()}"
everywhere = f"{sys.argv[4]}-all"
folders = everywhere, apart, "", "gs://all", f"gs://{apart}"
found["seen"] = [hosts.seen_by_all(folder) for folder in folders]
found["left"] = sorted(path.name for path in pathlib.Path(everywhere).iterdir())
with hosts.only_first(lambda: open(sys.argv[4], "a")) as file:
    file.write("one line\\n")
own = pathlib.Path(sys.argv[4] + f"-{jax.process_index()}")  # not on a drive that both share
with checkpoints.Saver(own / "run", 2) as saver:
    found["digests"] = [saver.save(step, {"a": np.arange(step)})[1] for step in (1, 2, 3)]
found["saved"] = checkpoints.steps(own / "run")
try:
    checkpoints.Saver(own / "run" / "3" / "files.json" / "x", 2)  # of the first, because it is a file there
except InputError as error:
    found["unsaved"] = str(error)
parts = {"a": np.arange(8.0), "b": np.arange(16).reshape(8, 2)}
work = lambda parts, shared: jax.tree.map(lambda x: x + shared * jax.numpy.mean(x), parts)
parallel.GATHERED = 40  # one row or two at a time
for layout in parallel.LAYOUTS:
    mine = jax.tree.map(lambda x: x[parallel.share(8)], parts)
    spread = parallel.spread(work, layout, parallel.devices_for(layout))(mine, np.float32(2))
    found[layout] = {name: np.asarray(x).ravel().tolist() for name, x in spread.items()}
job = builder.training(cli.load_config("configs/at.py:digits_lt"))
rows, count = next(training.chunks(job, job.steps_per_epoch))  # of the second epoch
print(json.dumps({**found, "ran": len(ran), "ids": rows[:count].ravel().tolist()}))
"""


@pytest.mark.long
@pytest.mark.slow
def test_what_the_first_process_does_for_all(tmp_path):
    port, log = free_port(), tmp_path / "log"
    env = with_devices(2, PYTHONPATH=str(ROOT))
    commands = [[sys.executable, "-c", SCRIPT, f"127.0.0.1:{port}", "2", str(i), str(log)] for i in range(2)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    said = [json.loads(out.splitlines()[-1]) for out in finish(processes)]
    assert [one["first"] for one in said] == [True, False]
    assert [one["ran"] for one in said] == [1, 0]
    assert [one["saved"] for one in said] == [[2, 3], []]
    assert log.read_text() == "one line\n"
    for one in said:
        assert one["devices"] == [4, 2]
        assert one["told"] == [0, 1, 2]
        assert one["error"] == "no such thing"
        assert one["long"]
        assert one["seen"] == [True, False, False, True, False]
    assert said[0]["left"] == []
    assert said[0]["fault"] == "KeyError('no such key')"
    assert said[1]["fault"].startswith('RuntimeError("the first process failed: ')
    for one in said:
        assert one["digests"] == said[0]["digests"]
        assert "cannot make" in one["unsaved"]
        for layout in ("jit", "pmap"):
            # Each device has two rows, and their mean is its own.
            assert one[layout]["a"] == [i + 2 * (i // 2 * 2 + 0.5) for i in range(8)]
            assert one[layout]["b"] == [i + 2 * (i // 4 * 4 + 1.5) for i in range(16)]
    ids = [one["ids"] for one in said]
    assert not set(ids[0]) & set(ids[1])
    assert [len(part) for part in ids] == [5 * 32, 5 * 32]
    assert len(set(ids[0]) | set(ids[1])) == 5 * 64


TOLD_BY_SLURM = """
import json, jax
from robal_jax.devices import hosts
hosts.start("auto")
print(json.dumps([jax.process_index(), jax.process_count(), hosts.by_first(lambda: "told")]))
"""


@pytest.mark.slow
def test_processes_join_as_slurm_tells_them():
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    each = {"JAX_COORDINATOR_PORT": str(free_port()), "PYTHONPATH": str(ROOT), **slurm}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOLD_BY_SLURM],
            cwd=ROOT, env=with_devices(1, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **each),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [json.loads(out.splitlines()[-1]) for out in finish(processes)]
    assert said == [[0, 2, "told"], [1, 2, "told"]]
