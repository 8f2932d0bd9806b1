"""Folders in buckets: what is written in which order, and what a kill leaves, in a bucket in memory.

Real servers: test_bucket_servers.py.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading

import fsspec
import numpy as np
import pytest
from helpers import wait_until

from robal_jax.devices import hosts
from robal_jax.errors import InputError
from robal_jax.storage import buckets, checkpoints, lock, mirror
from robal_jax.storage.buckets import Bucket, Copy

URL = "s3://bucket/runs/x"


# ---------------------------------------------------------------- a bucket in memory


class Weak:
    """A file system in memory that stops working after ``left`` changes, as a killed job does."""

    def __init__(self, store):
        self.fs, self.left, self.log, self.after = store, 10**6, [], lambda: None
        self.error = OSError(5, "https://x?X-Amz-Signature=1")

    def __getattr__(self, name):
        def call(path, *args, **kwargs):
            if name in ("pipe_file", "rm_file"):
                self.left -= 1
                self.log.append((name, path))
            if self.left < 0:
                raise self.error
            result = getattr(self.fs, name)(path, *args, **kwargs)
            if name in ("pipe_file", "rm_file"):
                self.after()
            for info in {"find": dict.values, "info": lambda info: [info]}.get(name, lambda _: ())(result):
                info["ETag"] = hashlib.md5(self.fs.cat_file(info["name"])).hexdigest()
            return result

        return call


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """``memory()``: a connection to an empty bucket, which later ones share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "PATIENCE", 0.1)
    monkeypatch.setattr(mirror, "PERIOD", 0.02)
    monkeypatch.setattr(mirror, "LAST_TRY", 0.1)
    monkeypatch.setattr(buckets, "AT_ONCE", 1)
    store = fsspec.filesystem("memory", skip_instance_cache=True, use_listings_cache=False)
    store.store.clear()
    store.pseudo_dirs.clear()
    weak = Weak(store)
    monkeypatch.setattr(buckets, "_filesystem", lambda scheme: weak)
    return weak


def new_machine():
    shutil.rmtree(pathlib.Path(os.environ["XDG_CACHE_HOME"]))


def state(step):
    return {"step": np.array(step), "weights": np.full((8, 8), step, np.float32)}


def run_up_to(folder, step, keep=2):
    """Writes what a training leaves at a step: the newest two checkpoints, and a best one."""
    (folder / "versions.json").write_text('{"robal_jax": "1"}')
    (folder / "config.json").write_text("{}")
    rows = "".join(json.dumps({"step": i}) + "\n" for i in range(1, step + 1))
    (folder / "metrics.jsonl").write_text(rows)
    with checkpoints.Saver(folder / "best", 1) as saver:
        saver.save(step, state(step))
    (folder / "best" / "best.json").write_text(json.dumps({"step": step}))
    with checkpoints.Saver(folder / "checkpoints", keep) as saver:
        saver.save(step, state(step))


def check_resumable(content):
    """What is in a bucket is what a killed training may leave; returns the newest step, 0 for none.

    ``content`` is what a reader takes from there, bytes by key.
    """
    found = sorted(
        int(key.split("/")[1]) for key in content if re.fullmatch(r"checkpoints/\d+/files.json", key)
    )
    for step in found:
        check_whole(content, f"checkpoints/{step}")
    if not found:
        return 0
    assert {"versions.json", "config.json", "metrics.jsonl"} <= content.keys()
    assert content["metrics.jsonl"].count(b"\n") >= found[-1]
    best = json.loads(content["best/best.json"])["step"]
    assert best >= found[-1]
    check_whole(content, f"best/{best}")
    return found[-1]


def check_whole(content, checkpoint):
    for name, digest in json.loads(content[f"{checkpoint}/files.json"]).items():
        assert hashlib.sha256(content[f"{checkpoint}/{name}"]).hexdigest() == digest


def read_by_a_new_machine():
    new_machine()
    place = buckets.fetched(URL)
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_names(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"{scheme}://bucket/runs/x"
    assert buckets.url_of(url) == buckets.url_of(f"{url}/") == buckets.url_of(pathlib.Path(url)) == url
    assert buckets.url_of("runs/x") is None
    assert buckets.url_of("other://bucket/x") is None
    for kind in ("read", "work"):
        copy = buckets.place(kind, url)
        assert buckets.url_of(copy / "evaluation") == f"{url}/evaluation"
        assert buckets.named(f"see {copy}, {copy}/a.") == f"see {url}, {url}/a."
    monkeypatch.setenv(
        {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}[scheme], "http://127.0.0.1:1"
    )
    assert buckets.place("read", url) not in (buckets.place("work", url), copy)
    assert buckets.url_of(buckets.place("read", url)) == url


@pytest.mark.parametrize(
    "url", ["s3://me:secret@bucket/x", "gs://bucket/x?key=secret", "s3://bucket/../secret"]
)
def test_a_url_that_cannot_be_used_is_not_quoted(url):
    with pytest.raises(InputError) as raised:
        buckets.fetched(url)
    assert "secret" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs")])
def test_without_the_extra(url, package, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.core", None)
    with pytest.raises(InputError, match=rf"needs {package} .*; .* pip install 'robal_jax\[buckets\]'"):
        buckets.fetched(url)


# ---------------------------------------------------------------- order, and kills


def test_whatever_a_kill_leaves_can_be_resumed(memory):
    """After every single change of the bucket, a reader finds what a training may resume from."""
    found, bucket = [], Bucket(URL)

    def look():
        found.append(check_resumable({key: bucket.read(key) for key in buckets.needed(bucket.entries())}))

    copy = Copy(bucket, buckets.place("work", URL))
    writer, memory.after = mirror.Writer(copy), look
    for step in (5, 9):
        run_up_to(copy.folder, step, keep=1)
        writer.write()
    assert found == sorted(found)
    assert set(found) == {0, 5, 9}
    assert len(found) > 50
    names = [path.removeprefix("bucket/runs/x/") for _, path in memory.log]
    assert not [name for name in names if "tmp" in name or name.startswith(".")]
    assert {"pipe_file", "rm_file"} == {name for name, _ in memory.log}


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False], ids=["new machine", "same machine"])
def test_a_killed_job_starts_again(memory, fresh, monkeypatch):
    """What the killed job left is found, what it had not written is written, and nothing broken is left."""
    leave(5)
    memory.left = 36
    with pytest.raises(InputError, match=r"cannot write to .* \(.+\); everything is in .*, and the same"):
        leave(9)
    memory.left = 10**6
    partly = buckets.broken(Bucket(URL).entries())
    assert partly
    if fresh:
        new_machine()
    said = []
    with mirror.kept(URL, said.append) as (folder, _):
        assert checkpoints.steps(folder / "checkpoints")[-1] == (5 if fresh else 9)
        assert not buckets.broken(Bucket(URL).entries())
        run_up_to(folder, 10)
        here = sorted(mirror.files_in(folder)[0])
    assert said == []
    assert sorted(Bucket(URL).entries()) == here
    assert check_resumable(read_by_a_new_machine()) == 10


def leave(step):
    """Does what a training does up to a step, in a bucket."""
    with mirror.kept(URL, print) as (folder, _):
        run_up_to(folder, step)


def test_a_damaged_object_is_noticed(memory):
    leave(5)
    leave(9)
    largest = max(
        (key for key in Bucket(URL).entries() if key.startswith("checkpoints/9/state/")),
        key=lambda key: Bucket(URL).entries()[key].size,
    )
    content = bytearray(Bucket(URL).read(largest))
    content[len(content) // 2] ^= 1
    Bucket(URL).write(largest, bytes(content))
    damaged = []
    with mirror.kept(URL, print) as (folder, _):
        found = checkpoints.restore_latest(
            folder / "checkpoints", state(0), on_damage=lambda *why: damaged.append(why)
        )
    assert int(found.tree["step"]) == 5
    assert [(path.name, why) for path, why in damaged] == [
        ("9", f"{largest.removeprefix('checkpoints/9/')} is not what was written")
    ]


def test_files_that_are_equal_are_not_read_again(memory, monkeypatch):
    leave(5)
    place = buckets.fetched(URL)
    got = []
    monkeypatch.setattr(Bucket, "get", lambda bucket, key, path: got.append(key))
    assert buckets.fetched(URL) == place
    assert got == []
    monkeypatch.undo()


# ---------------------------------------------------------------- errors


def test_a_bucket_that_cannot_be_reached_for_a_while(memory):
    said = []
    with mirror.kept(URL, said.append) as (folder, _):
        memory.left = 0
        (folder / "metrics.jsonl").write_text("1\n")
        wait_until(lambda: said)
        memory.left = 10**6
        wait_until(lambda: len(said) > 1)
    assert said == [
        f"warning: cannot write to {URL} (OSError); the work goes on, and what is saved is in {folder}",
        f"{URL} can be written to again, and has everything",
    ]
    assert Bucket(URL).read("metrics.jsonl") == b"1\n"
    assert list(Bucket(URL).entries()) == ["metrics.jsonl"]  # and no lock


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("secret"), "no permission"),
        (FileNotFoundError("secret"), "no such bucket"),
        (type("NoCredentialsError", (Exception,), {})("secret"), "no credentials"),
        (type("HttpError", (Exception,), {"code": 503})("secret"), "HttpError 503"),
    ],
)
def test_a_bucket_that_cannot_be_used(memory, error, said):
    memory.left, memory.error = 0, error
    with pytest.raises(InputError) as raised, mirror.kept(URL, print):
        pass
    assert str(raised.value) == (
        f"cannot use {URL} ({said}); check its name, the credentials in the environment and the network, and "
        "run the same command again"
    )


def test_an_error_of_the_job_is_named_and_what_it_had_is_written(memory):
    with pytest.raises(InputError, match=rf"^no file {URL}/a$"), mirror.kept(URL, print) as (folder, _):
        (folder / "b").write_text("b")
        raise InputError(f"no file {folder / 'a'}")
    assert Bucket(URL).read("b") == b"b"


# ---------------------------------------------------------------- several jobs


@pytest.mark.slow
def test_the_second_job_is_refused(memory, monkeypatch):
    me = lock.myself()
    other = me._replace(host="node7", boot="other")
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(mirror, "BEAT", 0.05)
    with mirror.kept(URL, print):
        held = json.loads(Bucket(URL).read(".lock"))
        assert held["pid"] == me.pid
        wait_until(lambda: json.loads(Bucket(URL).read(".lock"))["beat"] > held["beat"])
    ended = threading.Event()

    def beat():
        for count in range(1000):
            if ended.wait(0.05):
                break
            Bucket(URL).write(".lock", json.dumps({**other._asdict(), "beat": count}).encode())

    Bucket(URL).write(".lock", json.dumps(other._asdict()).encode())
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match=rf"{URL} is used by another process \(process {me.pid} on node7"):
        mirror.kept(URL, print).__enter__()
    ended.set()
    thread.join()
    with mirror.kept(URL, print):  # it has fallen silent
        assert json.loads(Bucket(URL).read(".lock"))["host"] == me.host


def test_a_job_that_lost_its_lock_stops_and_writes_nothing(memory, monkeypatch):
    monkeypatch.setattr(mirror, "BEAT", 0.02)
    said, stop = [], hosts.Stop()
    lost = pytest.raises(InputError, match=f"another job took {URL}")
    with lost, mirror.kept(URL, said.append, stop.ask) as (folder, _):
        assert not stop
        Bucket(URL).write(".lock", b"{}")
        wait_until(lambda: bool(stop))
        (folder / "metrics.jsonl").write_text("mine")
    assert said == [f"warning: another job took {URL} over; this one stops"]
    assert Bucket(URL).read("metrics.jsonl") is None
    assert Bucket(URL).read(".lock") == b"{}"


def test_a_lock_that_somebody_removed_is_taken_again(memory, monkeypatch):
    monkeypatch.setattr(mirror, "BEAT", 0.02)
    with mirror.kept(URL, print) as (folder, _):
        Bucket(URL).remove(".lock")
        wait_until(lambda: Bucket(URL).read(".lock") is not None)
        (folder / "metrics.jsonl").write_text("mine")
    assert Bucket(URL).read("metrics.jsonl") == b"mine"
    assert Bucket(URL).read(".lock") is None


def test_a_lock_that_went_in_a_long_silence_is_lost(memory, monkeypatch):
    """Another job may have taken it, and ended: its files would be written over."""
    mine = mirror.Lock(Bucket(URL))
    mine.acquire()
    Bucket(URL).remove(".lock")
    later = mirror._now() + lock.SILENCE
    monkeypatch.setattr(mirror, "_now", lambda: later)
    mine.beat()
    assert mine.lost
    assert Bucket(URL).read(".lock") is None


def test_a_job_in_another_container_is_seen_by_its_beats(memory, monkeypatch):
    """The container has the machine's identity, and may have our number of a process."""
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    theirs = lock.myself()._replace(host="container-a", space="pid:[1]")._asdict()
    ended = threading.Event()

    def beat():
        for count in range(1000):
            Bucket(URL).write(".lock", json.dumps({**theirs, "beat": count}).encode())
            if ended.wait(0.05):
                break

    thread = threading.Thread(target=beat)
    thread.start()
    wait_until(lambda: Bucket(URL).read(".lock") is not None)
    with pytest.raises(InputError, match=rf"{URL} is used by another process"):
        mirror.kept(URL, print).__enter__()
    ended.set()
    thread.join()


def test_a_holder_that_ends_meanwhile_is_no_obstacle(memory, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 600.0)  # longer than any test may take
    theirs = lock.myself()._replace(host="node7", boot="other")
    Bucket(URL).write(".lock", json.dumps(theirs._asdict()).encode())
    ended = threading.Event()

    def end():
        ended.set()
        Bucket(URL).remove(".lock")

    threading.Timer(0.3, end).start()
    with mirror.kept(URL, print):
        assert ended.is_set()


@pytest.mark.parametrize(
    ("root", "keys", "left"),
    [
        ("lab/checkpoints/2024/run1", ["config.json", "checkpoints/3/files.json", "checkpoints/3/d"], 3),
        ("lab/checkpoints/2024", ["config.json", "checkpoints/3/d"], 1),
        ("runs/x/checkpoints/3", ["_CHECKPOINT_METADATA", "state/d/0"], 0),
        ("runs/x/checkpoints/3", ["files.json", "state/d/0"], 2),
        ("runs/x/checkpoints", ["3/files.json", "3/d", "4/d"], 3),
    ],
)
def test_a_run_may_lie_in_a_folder_named_like_a_checkpoint(root, keys, left):
    assert len(buckets.needed(dict.fromkeys(keys), root)) == left


def test_what_arrived_without_an_answer_is_our_own(memory):
    """The first try arrives, but not its answer; the second one, of a longer file, does not arrive."""
    copy = Copy(Bucket(URL), buckets.place("work", URL))
    writer, path = mirror.Writer(copy), copy.folder / "metrics.jsonl"

    def lost():
        raise OSError

    path.write_bytes(b"")
    writer.write()
    for content, left in (b"1\n", 1), (b"1\n2\n", 0):
        path.write_bytes(content)
        memory.left, memory.after = left, lost
        with pytest.raises(buckets.BucketError):
            writer.write()
    memory.left = 10**6
    assert Bucket(URL).read("metrics.jsonl") == b"1\n"
    assert mirror.as_left(copy, copy.bucket.entries())


def test_what_was_changed_from_elsewhere_counts(memory):
    with mirror.kept(URL, print) as (folder, _):
        (folder / "metrics.jsonl").write_text("mine\n")
        (folder / "versions.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("mine\nnot written\n")
    with checkpoints.Saver(folder / "checkpoints", 2) as saver:
        saver.save(5, state(5))
    Bucket(URL).write("metrics.jsonl", b"theirs\n")
    said = []
    with mirror.kept(URL, said.append) as (folder, _):
        assert (folder / "metrics.jsonl").read_text() == "theirs\n"
        assert (folder / "versions.json").exists()
        assert not checkpoints.steps(folder / "checkpoints")
    (line,) = said
    assert line.startswith(f"{URL} was changed from elsewhere; what only this machine had is in {folder}-")
    aside = pathlib.Path(line.split(" is in ")[1].split(" (")[0])
    assert (aside / "metrics.jsonl").read_text() == "mine\nnot written\n"
