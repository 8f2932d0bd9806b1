"""The script for a machine with an accelerator (experiments/accelerator.py), and the kernels of a profile."""

import importlib.util
import signal
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import ROOT


def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


accelerator = loaded("accelerator", "experiments/accelerator.py")
profile = loaded("kernels", "experiments/benchmarks/kernels.py")
Job = accelerator.Job

# Like the library's: it saves and ends well when it is told to stop, and goes on where it was.
RESUMES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (saved.write_text("half"), print("saved"), sys.exit(0)))
saved = pathlib.Path(sys.argv[1])
if not saved.exists():
    print("from the beginning", flush=True)
    time.sleep(60)
print("to the end")
"""


def named(jobs):
    return {job.name: job for job in jobs}


@pytest.mark.parametrize("toy", [False, True])
def test_jobs_name_scripts_and_configs_that_exist(tmp_path, toy):
    jobs = [*accelerator.benchmarks(tmp_path, toy), *accelerator.real_runs(tmp_path, toy, "default")]
    assert len(named(jobs)) == len(jobs)
    names = [job.name for job in jobs]
    for number, job in enumerate(jobs):
        assert (ROOT / job.arguments[0]).is_file(), job.name
        assert "{" not in "".join(job.arguments)
        assert not job.after or job.after in names[:number]
        assert job.seconds is None or job.seconds < 8 * 60  # or it would never begin
        for flag in job.arguments:
            if flag.startswith("--config="):
                config = accelerator.get_config(flag.partition(":")[2])
                assert (config.model.name == "small_cnn") == toy
    trained = [name.removeprefix("train-") for name in names if name.startswith("train-")]
    methods = [run.split("-")[1] for run in trained]
    assert methods == ["at", "robal_n", "robal_r"] + ([] if toy else ["robal_n"])
    for run in trained:
        assert f"evaluation-{run}" in names and f"autoattack_1000-{run}" in names


def test_a_config_is_the_method_s_with_another_network():
    config = accelerator.get_config("robal_n:resnet18:cifar10_lt")
    assert config.model.to_dict() == {"name": "resnet18"}
    assert (config.method, config.train.epochs, config.evaluation.tau_p) == ("RoBal-N", 80, 0.1)


def test_flags_of_the_compiler_reach_the_environment(tmp_path):
    jobs = named(accelerator.benchmarks(tmp_path, toy=False))
    assert jobs["xla-nhwc"].environment == {"XLA_FLAGS": "--xla_gpu_force_conv_nhwc=true"}
    assert jobs["xla-nhwc"].arguments[2:] == jobs["xla-none"].arguments[2:]  # after script and record
    assert jobs["xla-none"].environment == {}


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    ran = []
    status = {"broken": "failed: status 1"}

    def run_job(job, work, seconds):
        ran.append(job.name)
        (work / "logs").mkdir(exist_ok=True)
        (work / "logs" / f"{job.name}.txt").write_text(f"log of {job.name}")
        return status.get(job.name, "done")

    monkeypatch.setattr(accelerator, "run_job", run_job)
    jobs = [
        Job("first", (), 50),
        Job("too_long", (), 150),
        Job("broken", ()),
        Job("of_broken", (), after="broken"),
        Job("of_first", (), after="first"),
    ]
    for _ in range(2):
        accelerator.run(jobs, tmp_path, tmp_path / "out", 100)
    assert ran == ["first", "broken", "of_first"]
    accelerator.run(jobs, tmp_path, tmp_path / "out", 200)
    assert ran[3:] == ["too_long"]
    assert accelerator.status_of("broken", tmp_path) == "failed: status 1"
    assert accelerator.status_of("of_broken", tmp_path) == ""
    with tarfile.open(tmp_path / "out" / "accelerator.tar.gz") as tar:
        assert {"ended/first", "logs/first.txt", "logs/too_long.txt"} <= set(tar.getnames())


def test_no_checkpoint_and_no_image_is_brought_back(tmp_path):
    for name in (
        "runs/a/metrics.jsonl",
        "runs/a/checkpoints/10/files.json",
        "runs/a/evaluation/examples.npz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    accelerator.collect(tmp_path, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "accelerator.tar.gz") as tar:
        assert tar.getnames() == ["runs/a/metrics.jsonl"]


def test_a_job_over_time_is_stopped_and_goes_on(tmp_path):
    (tmp_path / "job.py").write_text(RESUMES)
    job = Job("resumes", (str(tmp_path / "job.py"), str(tmp_path / "saved")))
    assert accelerator.run_job(job, tmp_path, 1.0) == ""
    assert accelerator.run_job(job, tmp_path, 30.0) == "done"
    log = (tmp_path / "logs" / "resumes.txt").read_text().splitlines()
    assert [line for line in log if not line.startswith("$")] == ["from the beginning", "saved", "to the end"]


def test_a_benchmark_over_time_has_failed(tmp_path):
    started = time.monotonic()
    job = Job("sleeps", ("-c", "import time; time.sleep(60)"), 0.2)
    assert accelerator.run_job(job, tmp_path, 0.2).startswith("failed: longer")
    assert time.monotonic() - started < 10


def test_the_job_s_process_ends_with_the_script(tmp_path, monkeypatch):
    started = []
    popen = accelerator.subprocess.Popen

    def record(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # as SIGTERM would in main()
        return started[0]

    handler = signal.signal(signal.SIGALRM, lambda *_: sys.exit(143))
    monkeypatch.setattr(accelerator.subprocess, "Popen", record)
    try:
        with pytest.raises(SystemExit):
            accelerator.run_job(Job("sleeps", ("-c", "import time; time.sleep(60)")), tmp_path, 30)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert started[0].returncode == -signal.SIGTERM


def event(pid, tid, name, dur):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": dur, "ts": 0}


def row(kind, pid, name, tid=None):
    return {"ph": "M", "pid": pid, "name": kind, "args": {"name": name}} | (
        {} if tid is None else {"tid": tid}
    )


def test_kernels_are_those_of_the_device_s_streams():
    device = [
        row("process_name", 1, "/device:GPU:0"),
        row("thread_name", 1, "Stream #13(Compute)", 13),
        row("thread_name", 1, "XLA Ops", 14),
        {"ph": "M", "pid": 1, "name": "process_sort_index", "args": {"sort_index": 1}},
        event(1, 13, "loop_add_fusion_1", 1000.0),
        event(1, 13, "loop_add_fusion_22", 500.0),
        event(1, 13, "sm90_gemm", 4000.0),
        event(1, 14, "loop_add_fusion_1", 9000.0),
    ]
    host = [
        row("process_name", 7, "/host:CPU"),
        row("thread_name", 7, "tf_XLAEigen/1", 1),
        event(7, 1, "dot.3", 2000.0),
        event(7, 1, "end: dot.3", 2.0),
        event(7, 1, "ThreadpoolListener::Record", 3.0),
    ]
    found = profile.kernels({"traceEvents": device + host})
    assert found == [("sm90_gemm", 4.0, 1), ("loop_add_fusion", 1.5, 2)]
    assert profile.kernels({"traceEvents": host}) == [("dot", 2.0, 1)]


def test_images_come_back_as_they_were_packed(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = {"train_labels": np.arange(130) % 10, "test_labels": np.arange(70) % 10}
    images = {
        "train_images": rng.integers(0, 256, (130, 32, 32, 3), np.uint8),
        "test_images": rng.integers(0, 256, (70, 32, 32, 3), np.uint8),
    }
    np.savez(tmp_path / "all.npz", **images, **labels)
    monkeypatch.setattr("robal_jax.data.long_tailed_counts", lambda *_: np.arange(10, 0, -1))
    monkeypatch.setattr(accelerator.subprocess, "run", lambda *_, **__: None)  # the wheels
    monkeypatch.setattr(accelerator, "digest", lambda path: "the same")
    (tmp_path / "carried").mkdir()
    accelerator.pack(tmp_path / "all.npz", tmp_path / "carried")
    accelerator.unpack(tmp_path / "carried", tmp_path)
    with np.load(tmp_path / "cifar10.npz") as file:
        kept = file["train_images"].any((1, 2, 3))
        assert kept.sum() == 55
        assert np.array_equal(file["train_images"][kept], images["train_images"][kept])
        assert np.array_equal(file["test_images"], images["test_images"])
        assert np.array_equal(file["train_labels"], labels["train_labels"])
    monkeypatch.setattr(accelerator, "digest", lambda path: "another")
    with pytest.raises(SystemExit, match="not those"):
        accelerator.unpack(tmp_path / "carried", tmp_path)
