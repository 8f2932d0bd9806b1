"""One job per folder (robal_jax.storage.lock)."""

import json
import os
import signal
import subprocess
import sys

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
    ("changes", "free"),
    [
        ({}, True),
        ({"pid": 1}, True),  # not at work, or the system's lock would be held
        ({"host": "renamed"}, True),  # a container that was started again on this machine
        ({"boot": "before"}, True),  # this machine before it was started again
        ({"host": "node7", "boot": "other"}, False),
        ({"host": "node7", "boot": ""}, False),
    ],
)
def test_what_a_dead_process_left(tmp_path, changes, free):
    holder = left_by(tmp_path, **changes)
    if free:
        with alone_in(tmp_path):
            pass
        return
    message = refused(tmp_path)
    assert f"(process {holder.pid} on node7, since {holder.since})" in message
    assert f"remove {tmp_path / '.lock'} if it is dead" in message
    (tmp_path / ".lock").unlink()
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": 1}', "\0\0\0"])
def test_a_damaged_file_is_no_obstacle(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with alone_in(tmp_path):
        pass


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
