"""What a machine may do to a command ends it in one line, or not at all, and costs no work."""

import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT

from robal_jax import cli, console
from robal_jax.devices import cpu, hosts
from robal_jax.devices.output import Tolerant
from robal_jax.errors import InputError, of_environment, user_path
from robal_jax.storage.files import write_whole
from robal_jax.storage.progress import Meter, Scalars


@pytest.fixture
def run_main(monkeypatch, capsys):
    """``run_main(main)`` is what the command line does with it: the exit status, and lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["script"])

    def run(main):
        # A shell lets its jobs in the background ignore Ctrl-C, and this may be one.
        status, handler = 0, signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            cli.run(main)
        except SystemExit as stopped:
            status = stopped.code
        finally:
            signal.signal(signal.SIGINT, handler)
        return status, capsys.readouterr().err.splitlines()

    return run


def raising(error):
    def main(arguments):
        raise error

    return main


# ---------------------------------------------------------------- errors of the machine


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "disk full (No space left on device: x)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full (Disk quota exceeded)"),
        (OSError(errno.EFBIG, "File too large", "x"), "raise the limit (ulimit -f)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "no permission (Permission denied: /x)"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "no permission (Read-only file system: /x)"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files in system"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "/nfs/x"), "check the drive or network"),
        (OSError(errno.ESTALE, "Stale file handle"), "check the drive or network"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "check the drive or network"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "choose a shorter one"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "gone (No such file: x); put back"),
        (OSError("no number"), "OSError: no number; remove the cause"),
        (OSError(errno.EIO, "{} {0} %s"), "({} {0} %s)"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory: 8 bytes."), "lower config.train.batch_size"),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY:\nout of memory"), "lower config.train.batch_size"),
        (MemoryError(), "lower config.train.batch_size"),
        (RuntimeError("Unable to initialize backend 'x': no"), "set JAX_PLATFORMS=cpu"),
    ],
)  # fmt: skip
def test_errors_of_the_machine_are_one_line(run_main, error, words):
    status, lines = run_main(raising(error))
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ")
    assert words in lines[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ValueError("a bug"), AssertionError(), KeyError("x")]
)
def test_a_bug_keeps_its_traceback(run_main, error):
    assert of_environment(error) is None
    with pytest.raises(type(error)):
        run_main(raising(error))


def test_out_of_memory_is_what_jax_says():
    jax = pytest.importorskip("jax")
    with pytest.raises(Exception) as raised:
        jax.block_until_ready(
            jax.jit(lambda: jax.numpy.ones((1 << 22, 1 << 20)) @ jax.numpy.ones((1 << 20, 3)))()
        )
    assert "lower config.train.batch_size" in of_environment(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("Unable to"), AssertionError(), ImportError("libcuda.so")])
def test_a_platform_that_cannot_start(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(hosts.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(InputError, match=r"JAX cannot start on cuda .* set JAX_PLATFORMS=cpu"):
        hosts.start("")


def test_errors_of_the_first_process_reach_all_in_their_kind():
    with pytest.raises(OSError, match="gone"):
        hosts.by_first(lambda: (_ for _ in ()).throw(OSError(errno.ESTALE, "gone")))


# ---------------------------------------------------------------- the cache of compiled programs, and homes


@pytest.mark.parametrize("folder", ["/proc/x", "file", "file/x", "x" * 300])
def test_a_cache_that_cannot_be_written_is_turned_off(tmp_path, folder):
    (tmp_path / "file").write_text("")
    found = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / folder)}
    assert "compiled programs are not kept" in cpu.drop_unusable_cache(found)
    assert found == {"JAX_COMPILATION_CACHE_DIR": ""}


@pytest.mark.parametrize("folder", ["", "gs://bucket/x", "new/folder"])
def test_a_cache_that_can_be_written_is_kept(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    found = {"JAX_COMPILATION_CACHE_DIR": folder}
    assert cpu.drop_unusable_cache(found) == ""
    assert found == {"JAX_COMPILATION_CACHE_DIR": folder}


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    found = {}
    cpu.prepare_jax(found)
    assert found["JAX_COMPILATION_CACHE_DIR"] == ""


@pytest.mark.parametrize(
    "name", ["run", "./~", "a~b", "$HOME/x", "${x}", "ä ö", "[a]", r"a\b", "%s", "{x}", "~x/.."]
)
def test_what_is_a_path_to_a_user(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path("~")) == "/home/me"
    assert str(user_path(f"~/{name}")) == str(pathlib.Path("/home/me", name))
    if name.startswith("~"):
        with pytest.raises(InputError, match=r"no home folder ~x for ~x/\.\.; write the whole path"):
            user_path(name)
    else:
        assert user_path(name) == pathlib.Path(name)


@pytest.mark.parametrize("flag", ["workdir", "folder", "checkpoint", "surrogate", "out", "weights", "config"])
def test_flags_know_home_folders(monkeypatch, flag):
    monkeypatch.setenv("HOME", "/home/me")
    texts = {flag: "", "rows": ""}
    assert cli.parse([f"--{flag}=~/x:y", "--rows=~/x"], texts, "") == {flag: "/home/me/x:y", "rows": "~/x"}
    assert cli.parse([f"--{flag}=$HOME/ä [b] \\"], texts, "")[flag] == "$HOME/ä [b] \\"


# ---------------------------------------------------------------- output


class Broken(io.StringIO):
    """A stream that takes nothing."""

    encoding = "utf-8"

    def __init__(self, error):
        super().__init__()
        self.broken = error

    def write(self, text):
        raise self.broken

    def flush(self):
        raise self.broken

    def isatty(self):
        raise self.broken


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "full": lambda: Broken(OSError(errno.ENOSPC, "No space left on device")),
    "pipe": lambda: Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "terminal": lambda: Broken(OSError(errno.EIO, "Input/output error")),
    "closed": closed,
    "none": lambda: None,
}


@pytest.mark.parametrize("stream", STREAMS)
def test_progress_never_ends_a_job(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", STREAMS[stream]())
    with Meter("train", 3, every=0.0) as meter:
        for done in range(4):
            meter.update(done, "loss 1.0")


@pytest.mark.parametrize(("done", "lines"), [(0, []), (2, ["train 2/3  resumed"]), (3, [])])
def test_a_job_that_goes_on_says_so_at_once(capsys, done, lines):
    with Meter("train", 3, done):
        assert capsys.readouterr().err.splitlines() == lines


def test_a_terminal_that_is_lost_ends_no_job(monkeypatch):
    class Terminal(Broken):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal(OSError(errno.EIO, "Input/output error")))
    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.setenv("TERM", "")
    with Meter("train", 3) as meter:
        for done in range(4):
            meter.update(done)


@pytest.mark.parametrize("stream", STREAMS)
def test_stdout_ends_no_command(monkeypatch, run_main, stream):
    done = []

    def main(arguments):
        print("class 中")
        done.append(1)

    monkeypatch.setattr(sys, "stdout", STREAMS[stream]())
    status, lines = run_main(main)
    assert (status, done) == (0, [1])
    lost = stream in ("full", "terminal", "closed")  # of a pipe the reader has read what it wanted
    assert len(lines) == lost
    assert all(line.startswith("warning: stdout lost a part of the output (") for line in lines)


@pytest.mark.parametrize("stream", STREAMS)
def test_output_that_is_all_that_a_command_makes(monkeypatch, run_main, stream):
    def main(arguments):
        print("the config")
        cli.check_shown()

    monkeypatch.setattr(sys, "stdout", STREAMS[stream]())
    status, lines = run_main(main)
    lost = stream in ("full", "terminal", "closed")
    assert (status, len(lines)) == ((2, 1) if lost else (0, 0))
    assert all(line.startswith("error: cannot write to stdout (") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [["train", "--help"], ["evaluate", "--help"], ["compare", "--help"], ["--help"], ["--version"], []],
)
def test_a_text_on_a_full_disk_is_an_error(monkeypatch, run_main, arguments):
    monkeypatch.setattr(sys, "stdout", STREAMS["full"]())
    status, lines = run_main(lambda _: console.start(arguments))
    assert (status, len(lines)) == (2, 1), lines
    monkeypatch.setattr(sys, "stdout", STREAMS["pipe"]())
    assert run_main(lambda _: console.start(arguments)) == (0, [])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_a_terminal_lacks(encoding):
    content = io.BytesIO()
    stream = Tolerant(io.TextIOWrapper(content, encoding))
    print("Käfer 中 \udcff", file=stream, flush=True)
    assert stream.error is None
    assert content.getvalue().decode(encoding).startswith("K")


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(),
        OSError(errno.ENOSPC, "full"),
        UnicodeEncodeError("a", "b", 0, 1, "c"),
        TypeError("say() takes 0 arguments"),
        KeyError("x"),
    ],
)
def test_a_message_that_cannot_be_said_is_lost(error):
    def say(line):
        raise error

    hosts.speaker(say)("resuming")


@pytest.mark.parametrize("say", [None, "quiet", 0])
def test_what_cannot_be_called_says_nothing(say):
    with pytest.raises(ValueError, match="pass a function of one text, such as print"):
        hosts.speaker(say)


def test_what_threads_of_other_languages_print(run_main, capsys):
    """Such an error reaches the main thread as an exception, too; others are shown."""

    def main(arguments):
        error = SimpleNamespace(
            exc_type=RuntimeError, exc_value=RuntimeError("x"), exc_traceback=None, err_msg=None, object=None
        )
        thread = threading.Thread(target=sys.unraisablehook, args=(error,))
        thread.start()
        thread.join()
        seen.append(len(shown))
        sys.unraisablehook(error)
        seen.append(len(shown))

    shown, seen = [], []
    with mock.patch.object(sys, "unraisablehook", shown.append):
        assert run_main(main) == (0, [])
    assert seen == [0, 1]


# ---------------------------------------------------------------- sys.exit and threads


@pytest.mark.parametrize("code", ["0", "", "1", "'text\\nmore'", "None"])
@pytest.mark.parametrize("end", ["sys.exit", "exit", "raise SystemExit"])
def test_a_config_file_that_ends_python_is_an_error(tmp_path, run_main, end, code):
    path = tmp_path / "mine.py"
    path.write_text(f"import sys\n\n\ndef get_config():\n    {end}({code})\n")
    status, lines = run_main(lambda _: cli.load_config(str(path)))
    assert (status, len(lines)) == (2, 1)
    assert f"ended the command ({path}:5); raise an error there" in lines[0]


def test_signals_in_another_thread():
    """Only the main thread can take them; elsewhere a job runs to its end."""
    found = []

    def work():
        with hosts.stop_signals() as stop:
            found.append(bool(stop))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- Ctrl-C


def test_an_interrupt_is_one_line_and_130(run_main):
    status, lines = run_main(raising(KeyboardInterrupt()))
    assert (status, len(lines)) == (130, 1)
    assert lines[0].startswith("error: interrupted; what was saved is intact")


def test_an_interrupt_that_a_library_turns_into_another_error(run_main):
    def main(arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt as error:
            traceback.print_exc()  # as NumPy does
            raise ImportError("numpy.core.multiarray failed to import") from error

    status, lines = run_main(main)
    assert (status, len(lines)) == (130, 1)


def test_a_second_sigterm_changes_nothing():
    with hosts.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop


# ---------------------------------------------------------------- metrics


ROWS = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]


@pytest.mark.parametrize(
    ("content", "kept", "dropped"),
    [
        ("\n".join(ROWS) + "\n", [2, 4], 0),
        (ROWS[0] + "\n" + ROWS[1][:9], [2], 1),
        (ROWS[0] + "\n" + "\0" * 100 + "\n" + ROWS[1] + "\n", [2, 4], 1),
        (ROWS[0] + "\n" + "\0" * 100, [2], 1),
        ("\0" * 9 + ROWS[0] + "\n" + ROWS[1] + "\n", [4], 1),
        ("no JSON\n[1]\n3\nnull\n{}\n" + '{"step": "x"}\n{"step": null}\n\n' + ROWS[0] + "\n", [2], 8),
        ("\u2028" + ROWS[0] + "\n" + ROWS[1] + "\n", [4], 1),
        ("", [], 0),
    ],
)  # fmt: skip
def test_broken_lines_of_metrics_are_dropped_and_counted(tmp_path, content, kept, dropped):
    (tmp_path / "metrics.jsonl").write_text(content)
    said = []
    with Scalars(tmp_path, 4, said.append) as scalars:
        scalars.write(8, {"loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*kept, 8]
    s = "s" if dropped > 1 else ""
    assert said == ([f"dropped {dropped} broken line{s} of {tmp_path / 'metrics.jsonl'}"] if dropped else [])


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + ROWS[0].encode() + b"\n")
    said = []
    with Scalars(tmp_path, 4, said.append):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ROWS[0] + "\n"
    assert len(said) == 1


def test_tensorboard_that_cannot_be_written_ends_no_training(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    with Scalars(tmp_path, 0, said.append) as scalars:
        scalars.write(1, {"loss": 0.5})
        scalars.write(2, {"loss": 0.4})
    assert len(said) == 1
    assert said[0].startswith(f"warning: cannot write {tmp_path / 'tensorboard'} (")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_reads_what_is_written(tmp_path):
    with Scalars(tmp_path, 4, pytest.fail) as scalars:
        scalars.write(5, {"loss": np.float32(0.5).item(), "learning_rate": 0.1})
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content = file.read_bytes()
    assert content.count(b"loss") == content.count(b"learning_rate") == 1


# ---------------------------------------------------------------- files


def test_a_file_that_cannot_be_completed_leaves_nothing(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"before")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid")))
    write_whole(tmp_path / "file", b"after")  # a drive that cannot do it
    assert (tmp_path / "file").read_bytes() == b"after"


# ---------------------------------------------------------------- as a user sees it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "settings", "status", "said"),
    [
        ("exec 1>/dev/full;", {}, 2, "error: cannot write to stdout (OSError: [Errno 28]"),
        ("exec 1>&-;", {}, 0, ""),
        ("exec 0<&- 1>&-;", {}, 0, ""),
        ("unset JAX_COMPILATION_CACHE_DIR;", {"XDG_CACHE_HOME": "/proc/x"}, 0, "warning: cannot write"),
        ("unset TERM;", {"PYTHONIOENCODING": "ascii", "LANG": "C", "COLUMNS": "1"}, 0, ""),
        ("mkdir gone; cd gone; rmdir ../gone;", {}, 0, ""),
    ],
)  # fmt: skip
def test_commands_in_odd_places(tmp_path, prefix, settings, status, said):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    command = f"{prefix} exec {sys.executable} {ROOT}/experiments/compare.py --help"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)
