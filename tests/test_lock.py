"""One job per folder (robal_jax.storage.lock)."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from robal_jax.errors import InputError
from robal_jax.storage import lock
from robal_jax.storage.lock import alone_in

HOLD = """
import pathlib, sys, time
from robal_jax.storage.lock import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
    print("at work", flush=True)
    time.sleep(60)
"""


def left_by(folder, **changes):
    """The file of a process that was killed; ``changes`` say where and which."""
    holder = lock.myself()._replace(**changes)
    (folder / ".lock").write_text(json.dumps(holder._asdict()))
    return holder


def refused(folder):
    with pytest.raises(InputError) as raised, alone_in(folder):
        pass
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_nothing_is_left(tmp_path):
    with alone_in(tmp_path / "new" / "folder"):
        assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [".lock"]
    assert not list((tmp_path / "new" / "folder").iterdir())
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path / "new"):
        _ = 1 / 0
    with alone_in(tmp_path / "new"):
        pass


def test_the_second_is_told_who_is_at_work(tmp_path):
    me = lock.myself()
    with alone_in(tmp_path):
        message = refused(tmp_path)
    assert f"{tmp_path} is used by another process (process {me.pid} on {me.host}, since 2" in message
    assert "wait until it has ended, or choose another folder" in message


def test_of_two_processes_one_waits_and_a_killed_one_is_no_obstacle(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "at work\n"
    assert f"(process {process.pid} on " in refused(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".lock").exists()
    with alone_in(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pid": 1},  # not at work, or the system's lock would be held
        {"host": "renamed"},  # a container that was started again on this machine
        {"boot": "before"},  # this machine before it was started again
    ],
)
def test_what_a_dead_process_left(tmp_path, changes):
    left_by(tmp_path, **changes)
    with alone_in(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("boot", ["other", ""])
def test_a_job_of_another_machine(tmp_path, monkeypatch, capfd, boot):
    """It is at work while it touches its file; one that fell silent may be followed."""
    monkeypatch.setattr(lock, "SILENCE", 0.6)
    holder = left_by(tmp_path, host="node7", boot=boot)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    message = refused(tmp_path)
    ended.set()
    thread.join()
    assert f"(process {holder.pid} on node7, since {holder.since})" in message
    with alone_in(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["host"] == lock.myself().host
    assert f"was used by process {holder.pid} on node7; waiting up to 0.6 s" in capfd.readouterr().err


@pytest.mark.slow
def test_a_job_of_another_machine_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 600.0)  # longer than any test may take
    left_by(tmp_path, host="node7", boot="other")
    ended = threading.Event()

    def end():
        ended.set()
        (tmp_path / ".lock").unlink()

    threading.Timer(0.6, end).start()
    with alone_in(tmp_path):
        assert ended.is_set()


@pytest.mark.slow
def test_a_holder_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with alone_in(tmp_path):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / ".lock").stat().st_mtime_ns > before


@pytest.mark.slow
def test_a_holder_is_told_of_its_loss(tmp_path, monkeypatch):
    """Such as one that was suspended, on a drive whose locks other machines do not see."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    told = []
    with alone_in(tmp_path, on_loss=told.append):
        left_by(tmp_path, host="elsewhere")
        time.sleep(0.5)
        assert told == [f"warning: another job took {tmp_path} over; this one stops"]
    assert "elsewhere" in (tmp_path / ".lock").read_text()


def test_of_two_that_begin_together_one_waits(tmp_path, monkeypatch):
    """Without locks both may write; what stands in the file in the end decides."""
    monkeypatch.setattr(lock, "_lock", lambda file: None)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: left_by(tmp_path, pid=os.getppid()))
    assert f"(process {os.getppid()} on " in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": 1}', "\0\0\0"])
def test_a_damaged_file_is_no_obstacle(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"my own", b"\xff\xfe", b"1234\n"])
def test_a_file_of_another_program_stays(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    assert ".lock is not of a job, and would be lost; choose another folder" in refused(tmp_path)
    assert (tmp_path / ".lock").read_bytes() == content


def test_a_drive_without_locks(tmp_path, monkeypatch):
    """The process that the file names decides."""

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    left_by(tmp_path, pid=2**22 + 1)  # above the largest number of a process
    with alone_in(tmp_path):
        pass
    left_by(tmp_path, pid=os.getppid())
    assert f"(process {os.getppid()} on " in refused(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    assert "(File exists); choose another folder" in refused(tmp_path / "file")
    assert "(Not a directory); choose another folder" in refused(tmp_path / "file" / "x")
    assert "(File name too long); choose another folder" in refused(tmp_path / ("x" * 300))


def beating(path, seconds=0.05):
    """Touches a file from now on; returns what ends that."""
    ended = threading.Event()

    def beat():
        while not ended.wait(seconds):
            os.utime(path)

    threading.Thread(target=beat, daemon=True).start()
    return ended.set


@pytest.mark.slow
def test_a_drive_without_locks_under_another_container(tmp_path, monkeypatch):
    """Its number of a process may be ours; so only a sign of life tells."""

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    left_by(tmp_path, space="pid:[1]")
    end = beating(tmp_path / ".lock")
    assert f"(process {os.getpid()} on " in refused(tmp_path)
    end()
    with alone_in(tmp_path):
        pass


def test_the_lock_of_a_job_that_took_over_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with alone_in(tmp_path):
        left_by(tmp_path, host="node7", boot="other")
        before = (tmp_path / ".lock").stat().st_mtime_ns
        time.sleep(0.2)
        assert (tmp_path / ".lock").stat().st_mtime_ns == before
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "node7"


def test_whoever_is_patient_gets_the_folder(tmp_path):
    ended, entered = threading.Event(), threading.Event()

    def hold():
        with alone_in(tmp_path):
            entered.set()
            ended.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    refused(tmp_path)
    threading.Timer(0.3, ended.set).start()
    with alone_in(tmp_path, 10.0):
        assert ended.is_set()
    thread.join()
