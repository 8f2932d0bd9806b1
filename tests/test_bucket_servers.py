"""Runs whose folder is in a bucket: real servers on this machine, killed jobs, several processes, faults.

``ROBAL_BUCKETS`` says how many times a training on each server is killed, by default once.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from helpers import wait_until

from experiments.benchmarks.layouts import free_port
from robal_jax.storage import buckets

KILLS = int(os.environ.get("ROBAL_BUCKETS", "1"))

COMMAND = """
import sys
from robal_jax import cli
from robal_jax.storage import buckets, mirror
mirror.PERIOD = 0.2  # so that many kills and faults fall into a transfer
buckets.PATIENCE = float(sys.argv.pop(2))
from experiments import evaluate, reproduce, train
cli.run({"train": train, "evaluate": evaluate, "reproduce": reproduce}[sys.argv.pop(1)].main)
"""
STEPS = 30


class Server:
    """A server on this machine, with a bucket.

    Attributes:
      url: of the folder of all runs.
      port: where it listens.
      caches: a folder for the copies of all machines.
    """

    def __init__(self, scheme, port, caches):
        self.url, self.port, self.caches = f"{scheme}://bucket/runs", port, caches

    def env(self, port, machine):
        address = f"http://127.0.0.1:{port or self.port}"
        return {
            **os.environ,
            "XDG_CACHE_HOME": str(self.caches / str(machine)),
            "AWS_ENDPOINT_URL": address,
            "STORAGE_EMULATOR_HOST": address,
            "AWS_ACCESS_KEY_ID": "nobodyskey",
            "AWS_SECRET_ACCESS_KEY": "nobodyssecret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, script, *flags, processes=1, port=None, patience=60, **env):
        """Starts a job, each process on a machine of its own."""
        together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
        command = [sys.executable, "-c", COMMAND, script, str(patience), *flags]
        return [
            subprocess.Popen(
                [*command, *([*together, f"--process={i}"] if processes > 1 else [])],
                env=self.env(port, i) | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for i in range(processes)
        ]  # fmt: skip

    def train(self, workdir, **how):
        flags = ("epochs=6", "checkpoint_epochs=1")
        return self.start(
            "train",
            f"--config={ROOT}/configs/robal_n.py:digits_lt",
            f"--workdir={workdir}",
            "--config.schedule.milestones=(3,5)",
            "--config.attack.steps=2",
            *(f"--config.train.{flag}" for flag in flags),
            **how,
        )

    def lose_machines(self):
        shutil.rmtree(self.caches)

    def journal(self, workdir):
        """How often the copy of a run's folder has changed what it remembers."""
        found = self.caches.glob(f"0/robal_jax/buckets/work/*/bucket/runs/{workdir}/@/.bucket.jsonl")
        return sum(path.read_text().count("\n") for path in found)


def finish(processes, status=0):
    """Waits for a job; what its first process said."""
    said = [process.communicate(timeout=120) for process in processes]
    for process, (out, errors) in zip(processes, said, strict=True):
        assert process.returncode == status, out + errors
        assert "nobodys" not in out + errors
        assert "Traceback" not in out + errors
    return said[0][0]


def digest_of(said):
    return said.splitlines()[-1].partition(" sha256 ")[2]


SERVERS = {
    "s3": ("moto.server", "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"),
    "gs": (
        "gcp_storage_emulator.server",
        # As real servers do, and unlike the emulator, it drops what a killed client did not send whole.
        "from gcp_storage_emulator import server; read = server._read_raw_data\n"
        "def whole(request):\n"
        "    content, size = read(request), request.headers.get('Content-Length')\n"
        "    assert not size or len(content) == int(size)\n"
        "    return content\n"
        "server._read_raw_data = whole\n"
        "server.create_server('127.0.0.1', {port}, True, default_bucket='bucket').run()",
    ),
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory, optimised):
    """A server with an empty bucket; skips where its package or that of the client is not installed."""
    module, code = SERVERS[request.param]
    for name in (module, {"s3": "s3fs", "gs": "gcsfs"}[request.param]):
        pytest.importorskip(name)
    port = free_port()
    found = Server(request.param, port, tmp_path_factory.mktemp(request.param) / "caches")
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(port=port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: answers(f"http://127.0.0.1:{port}"), 120)
    if request.param == "s3":
        put = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.urlopen(put).close()
    yield found
    process.terminate()
    process.wait()


def answers(address):
    try:
        urllib.request.urlopen(address).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory):
    """The digest of the training in a local folder."""
    return digest_of(finish(server.train(tmp_path_factory.mktemp("local") / "run")))


@pytest.mark.long
@pytest.mark.slow
def test_objects_arrive_whole_whatever_their_end(server, monkeypatch):
    for name, value in server.env(None, 0).items():
        monkeypatch.setenv(name, value)
    bucket = buckets.Bucket(f"{server.url}/ends")
    for end in (b"", b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r"):
        for content, new in ((b"first" + end, True), (b"second" + end, False)):
            bucket.write(f"of {end.hex()}", content, new=new)
            assert bucket.read(f"of {end.hex()}") == content


# ---------------------------------------------------------------- kills


@pytest.mark.long
@pytest.mark.slow
def test_killed_trainings_end_with_the_same_digest(server, expected, capsys):
    """Each is killed while it writes to the bucket, and resumes on another machine, which has no copy."""
    generator = random.Random(0)
    resumed, most = [], 160
    for i in range(2 * KILLS):
        (process,), changes = server.train(f"{server.url}/{i}"), generator.randrange(20, most)
        wait_until(lambda i=i, n=changes, p=process: server.journal(i) > n or p.poll() is not None, 300)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it had ended: a fast machine writes less often
            most = server.journal(i)
            continue
        assert process.returncode == -signal.SIGKILL
        server.lose_machines()
        out = finish(server.train(f"{server.url}/{i}"))
        assert out.splitlines()[-1] == f"checkpoint {server.url}/{i}/checkpoints/{STEPS} sha256 {expected}"
        first = out.splitlines()[0]
        resumed.append(int(first.split()[3]) if first.startswith("resuming at step ") else 0)
        if len(resumed) == KILLS:
            break
    assert len(resumed) == KILLS
    with capsys.disabled():
        print(f"\n{server.url}: {KILLS} kills, resumed at steps {resumed}, all with the same digest")


# ---------------------------------------------------------------- several processes


def metrics_of(server, workdir):
    """The metrics in the copy of the first machine; None if there is none."""
    return next(server.caches.glob(f"0/robal_jax/buckets/work/*/bucket/runs/{workdir}/@/metrics.jsonl"), None)


def step_in(server, workdir):
    """The last step that the first machine's metrics name."""
    path = metrics_of(server, workdir)
    lines = path.read_text().splitlines() if path else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.long
@pytest.mark.slow
def test_several_processes_on_machines_that_share_nothing_else(server, tmp_path):
    """They are told to stop, lose a host, and end with the bits of a run that was left alone."""
    expected = digest_of(finish(server.train(tmp_path / "run", processes=2)))
    url = f"{server.url}/two"

    jobs = server.train(url, processes=2)
    wait_until(lambda: step_in(server, "two") >= 5 or jobs[0].poll() is not None, 300)
    jobs[1].send_signal(signal.SIGTERM)  # a maintenance notice to one host
    said = finish(jobs)
    (stopped,) = [line for line in said.splitlines() if line.startswith("stopped at step ")]
    step = int(stopped.split()[3])
    assert f"checkpoint {url}/checkpoints/{step} sha256 " in said.splitlines()[-1]
    server.lose_machines()

    jobs = server.train(url, processes=2)
    wait_until(lambda: step_in(server, "two") > step or jobs[0].poll() is not None, 300)
    jobs[0].send_signal(signal.SIGKILL)  # a host that disappears; the other one ends by itself
    for job in jobs:
        job.communicate(timeout=120)
        assert job.returncode != 0
    server.lose_machines()

    said = finish(server.train(url, processes=2))
    assert "resuming at step " in said
    assert said.splitlines()[-1] == f"checkpoint {url}/checkpoints/{STEPS} sha256 {expected}"
    server.lose_machines()

    flags = [f"--workdir={url}", "--autoattack=none", "--audit=0", "--examples=50"]
    finish(server.start("evaluate", *flags, processes=2))
    finish(server.start("evaluate", *flags, f"--folder={tmp_path}/alone"))
    work = server.caches.glob(
        "0/robal_jax/buckets/work/*/bucket/runs/two/evaluation-50-images/@/examples.npz"
    )
    found, alone = np.load(next(work)), np.load(tmp_path / "alone" / "examples.npz")
    assert found.files == alone.files
    for name in alone:
        np.testing.assert_array_equal(found[name], alone[name], err_msg=name)


@pytest.mark.long
@pytest.mark.slow
def test_resumed_on_a_smaller_slice(server, tmp_path):
    """Four processes are told to stop, and two go on, in float64: only the order of sums differs."""
    (alone,) = server.train(tmp_path / "run", JAX_ENABLE_X64="1")
    finish([alone])
    jobs = server.train(f"{server.url}/slice", processes=4, JAX_ENABLE_X64="1")
    wait_until(lambda: step_in(server, "slice") >= 5 or jobs[0].poll() is not None, 300)
    jobs[3].send_signal(signal.SIGTERM)
    assert "stopped at step " in finish(jobs)
    server.lose_machines()
    said = finish(server.train(f"{server.url}/slice", processes=2, JAX_ENABLE_X64="1"))
    assert "resuming at step " in said
    assert f"/checkpoints/{STEPS} sha256 " in said.splitlines()[-1]
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in (metrics_of(server, "slice"), tmp_path / "run/metrics.jsonl")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-9)


# ---------------------------------------------------------------- tables


@pytest.mark.long
@pytest.mark.slow
def test_a_table_goes_on_elsewhere(server, tmp_path):
    """It is killed while it fine-tunes, and ends on another machine as in a local folder."""
    flags = (
        "--table=1",
        "--rows=at,lws",
        "--seeds=1",
        "--config.train.epochs=2",
        "--config.schedule.milestones=()",
    )
    small = "--config.data.test_per_class=3"
    finish(server.start("reproduce", *flags, small, f"--out={tmp_path}/out"))
    url = f"{server.url}/tables"
    (process,) = server.start("reproduce", *flags, small, f"--out={url}")
    said = ""
    while "[3/4]" not in said:
        said += process.stdout.readline()
    process.kill()
    process.communicate()
    server.lose_machines()
    out = finish(server.start("reproduce", *flags, small, f"--out={url}"))
    assert "4 trainings and evaluations, 2 of them done" in out
    assert f"table, and the commands of its rows: {url}/digits_lt/tables/table1.md" in out
    place = next(
        server.caches.glob("0/robal_jax/buckets/work/*/bucket/runs/tables/digits_lt/tables/@/table1.md")
    )
    texts = [
        path.read_text().replace(str(out), "OUT")
        for path, out in ((place, url), (tmp_path / "out/digits_lt/table1.md", tmp_path / "out"))
    ]
    assert texts[0] == texts[1]
    assert url in place.read_text()
    assert "4 of them done" in finish(server.start("reproduce", *flags, small, f"--out={url}"))


# ---------------------------------------------------------------- faults


class Faulty:
    """A relay to a server that is slow, answers errors, and loses connections in the middle of a message.

    Attributes:
      port: where it listens.
      works: whether the server can be reached at all.
      faults: how often each kind came.
    """

    def __init__(self, port, share):
        self._behind, self._share, self._random = port, share, random.Random(1)
        self.works, self.faults = True, {"error": 0, "slow": 0, "lost": 0}
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client):
        kind = self._random.choice(tuple(self.faults)) if self._random.random() < self._share else ""
        with client, contextlib.suppress(OSError):
            if not self.works:
                return
            if kind:
                self.faults[kind] += 1
            if kind == "error":
                client.recv(2**16)
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            time.sleep(2 if kind == "slow" else 0)
            left = self._random.randrange(2**14) if kind == "lost" else 2**60
            with socket.create_connection(("127.0.0.1", self._behind)) as server:
                back = threading.Thread(target=self._copy, args=(server, client, 2**60), daemon=True)
                back.start()
                self._copy(client, server, left)
                if kind != "lost":
                    back.join()

    def _copy(self, source, target, left):
        with contextlib.suppress(OSError):
            while left > 0 and self.works and (content := source.recv(min(left, 2**14))):
                target.sendall(content)
                left -= len(content)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.long
@pytest.mark.slow
def test_a_server_that_fails_now_and_then(server, expected):
    relay = Faulty(server.port, share=0.3)
    said = finish(server.train(f"{server.url}/faulty", port=relay.port))
    assert min(relay.faults.values()) > 0
    assert digest_of(said) == expected
    server.lose_machines()
    assert digest_of(finish(server.train(f"{server.url}/faulty"))) == expected  # it is all there


@pytest.mark.long
@pytest.mark.slow
def test_a_server_that_is_lost_in_the_middle(server, expected):
    """The training ends, one line says where everything is, and the same command writes it."""
    relay = Faulty(server.port, share=0)
    url = f"{server.url}/lost"
    jobs = server.train(url, port=relay.port, patience=3)
    wait_until(lambda: step_in(server, "lost") >= 10 or jobs[0].poll() is not None, 300)
    relay.works = False
    out, errors = jobs[0].communicate(timeout=120)
    assert jobs[0].returncode == 2
    assert [line for line in out.splitlines() if line.startswith("warning: cannot write to ")] == [
        line for line in out.splitlines() if url in line and "warning" in line
    ]
    (error,) = [line for line in errors.splitlines() if "cannot write to" in line]
    assert re.match(rf"error: cannot write to {url} \(.+\); everything is in {server.caches}", error)
    assert "Traceback" not in out + errors
    relay.works = True
    assert digest_of(finish(server.train(url, port=relay.port))) == expected
    server.lose_machines()
    assert digest_of(finish(server.train(url))) == expected
