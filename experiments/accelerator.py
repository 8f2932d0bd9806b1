"""Benchmarks and real runs on a machine with an accelerator and without network, in calls of a few minutes.

Where there is a network and the data (cifar10.npz as ``sources.load_cifar_lt`` reads it), once; 57 MiB:

    python experiments/accelerator.py --stage=pack --carried=runs/carried --data=cifar10.npz

On the machine, with this repository and that folder, then as often as there is time; a machine that goes back
when it is idle takes its disk along, so a call follows the one before at once:

    python experiments/accelerator.py --stage=setup --carried=runs/carried &&
    python experiments/accelerator.py --stage=run --minutes=8
    python experiments/accelerator.py --stage=run --minutes=9

A call goes through the jobs in order: the benchmarks, then ResNet-18 on CIFAR-10-LT (AT, RoBal-N, RoBal-R),
then WRN-34-10. What has ended is not begun again, unless its file in the folder "ended" is deleted. A
benchmark begins only if the time that it may take is left. When the minutes are over, training and evaluation
get SIGTERM, have 40 s to save, and go on in the next call. Logs, tables and metrics lie in $OUT (runs/out by
default) as accelerator.tar.gz, renewed after every job.

Where a machine is there for a quarter of an hour only, --only chooses what it is for: the goals for one GPU
want step-wrn, kernels-wrn, roofline-wrn and attacks; the real runs take a machine or two of their own.

    --stage=status            what is done
    --only=train,evaluation   jobs whose names begin so; with autoattack, these are the real runs
    --precision=bfloat16      of training; by default TF32 on a GPU
    --work=DIR                folder of everything on the machine; robal in that for temporary files
    --toy=yes                 all of it, tiny, for a CPU: --toy=yes --work=runs/toy --minutes=2
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WHEELS = [
    *("ml-collections>=1.1", "orbax-checkpoint>=0.12.8,<0.13", "tensorboardX>=2.6.2", "torchattacks"),
    *("matplotlib>=3.9", "rich>=13.7", "packaging", "contourpy", "cycler", "fonttools", "kiwisolver"),
    *("pyparsing", "python-dateutil", "six"),
]
"""What training and evaluation need, and a machine may lack that has JAX, Flax, Optax and Orbax."""
SHEET = 2500, 50  # images of a picture, and of a row of it
GRACE = 40.0  # seconds to save
SHORTEST = 20.0  # seconds in which it pays to begin a job that resumes
TOY_SECONDS = 100.0
COLLECTED = (".txt", ".json", ".jsonl", ".md", ".csv", ".html")
COLLECTED_BYTES = 2 * 2**20  # of a file

# Seconds that it may take, name, script and flags. The first tables matter most.
BENCHMARKS = """
300 step-wrn_34_10     step --networks=wrn_34_10 --methods=robal_n --batch=64 {goal}
150 kernels-wrn_34_10  kernels --networks=wrn_34_10 --precision=bfloat16
300 roofline-wrn_34_10 roofline --networks=wrn_34_10 --precision=bfloat16
420 attacks-resnet18   evaluation --networks=resnet18
420 step-resnet18      step --networks=resnet18 --methods=robal_n --batch=64 {both}
420 step-all           step --networks=wrn_34_10 --methods=robal_n --batch=64 {both}
200 xla-none           {xla}
200 xla-nhwc           {xla} XLA_FLAGS=--xla_gpu_force_conv_nhwc=true
200 xla-nhwc_tf32      {xla},default XLA_FLAGS=--xla_gpu_force_conv_nhwc=true
200 xla-no_triton_gemm {xla} XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
200 xla-no_autotuning  {xla} XLA_FLAGS=--xla_gpu_autotune_level=0
200 xla-hidden_latency {xla} XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
200 xla-unrolled       {xla} XLA_FLAGS=--xla_gpu_command_buffer_unroll_loops=true
120 overhead           overhead
100 kernels-resnet18   kernels --networks=resnet18 --precision=bfloat16
200 roofline-resnet18  roofline --networks=resnet18 --precision=bfloat16
300 memory-resnet18    memory --networks=resnet18 --precision=bfloat16
300 memory-wrn_34_10   memory --networks=wrn_34_10 --batch=64,512 --precision=bfloat16
300 startup            startup --networks=resnet18 --repeats=1
300 step-small         step --networks=digits_cnn,wrn_16_2 --batch=64 {both} {eager}
300 step-at            step --networks=resnet18,wrn_34_10 --methods=at --batch=64 {both} {eager}
300 step-256           step --networks=resnet18,wrn_34_10 --methods=robal_n --batch=256 {both} {eager}
150 loops              loops
"""
TOY_BENCHMARKS = """
0 step-digits_cnn {tiny} --methods=robal_n --batch=16
0 kernels         kernels --networks=digits_cnn --batch=16
0 roofline        roofline --networks=digits_cnn --batch=16
0 attacks         evaluation --networks=digits_cnn --images=16 --repeats=1 --steps=2 --queries=2
0 xla-none        {tiny} --methods=at --batch=4
0 startup         startup --networks=digits_cnn --batch=16 --repeats=1 --run_steps=0
0 overhead        overhead --steps=100 --batch=8 --repeats=1
0 memory          memory --networks=digits_cnn --batch=64
0 loops           loops --network=digits_cnn --batch=4 --repeats=1
"""
SHORT = {
    # torch.compile takes minutes, so what the goals want comes without the other ways
    "goal": "--steps=10 --precision=bfloat16 '--variants=channels_last, bf16;channels_last, bf16, compiled'",
    "both": "--steps=10 --precision=bfloat16,default",
    "eager": "'--variants=channels_last, bf16'",
    "xla": "step --networks=wrn_34_10 --methods=robal_n --batch=64 --steps=10 --variants=none"
    " --precision=bfloat16",
    "tiny": "step --networks=digits_cnn --steps=1 --repeats=1 --variants=none",
}


class Job(NamedTuple):
    """A process to run.

    Attributes:
      name: of its log and its results.
      arguments: behind ``python``.
      seconds: that it may take; None for a job that saves on SIGTERM, and that the same command resumes.
      after: a job that must have succeeded before.
      environment: in addition.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float | None = None
    after: str = ""
    environment: Mapping[str, str] = {}


def get_config(argument: str) -> Any:
    """A method with another network: ``--config=experiments/accelerator.py:robal_n:resnet18:cifar10_lt``."""
    from ml_collections import ConfigDict

    from experiments.benchmarks import step

    method, network, data = argument.split(":")
    config = importlib.import_module(f"configs.{method}").get_config(data)
    config.model = ConfigDict(step.NETWORKS[network])
    return config


def benchmarks(work: pathlib.Path, toy: bool) -> list[Job]:
    """The tables, as jobs."""
    jobs, table = [], TOY_BENCHMARKS if toy else BENCHMARKS
    for line in table.strip().format(**SHORT).splitlines():
        seconds, name, script, *flags = shlex.split(line)
        environment = dict(flag.split("=", 1) for flag in flags if flag.startswith("XLA_FLAGS="))
        arguments = [f"experiments/benchmarks/{script}.py", f"--json={work}/results/{name}.json"]
        arguments += [flag for flag in flags if flag.startswith("--")]
        limit = TOY_SECONDS if toy else float(seconds)
        jobs.append(Job(name, tuple(arguments), limit, environment=environment))
    return jobs


def real_runs(work: pathlib.Path, toy: bool, precision: str) -> list[Job]:
    """Training and evaluation on CIFAR-10-LT; full AutoAttack on the first 1,000 test images, then on all."""
    data = "digits_lt" if toy else "cifar10_lt"
    usual, large = ("digits_cnn", "") if toy else ("resnet18", "wrn_34_10")

    def path(file: str) -> list[str]:
        return [] if toy else [f"--config.data.path={work}/{file}.npz"]

    def train(run: str) -> Job:
        network, method = run.split("-")
        flags = [f"--config=experiments/accelerator.py:{method}:{network}:{data}", *path("cifar10")]
        flags += [f"--workdir={work}/runs/{run}", f"--config.train.precision={precision}"]
        flags += ["--config.train.epochs=2", "--config.data.test_per_class=3"] if toy else []
        return Job(f"train-{run}", ("experiments/train.py", *flags))

    def evaluate(run: str, kind: str, attack: str, file: str = "cifar10") -> Job:
        folder = f"{work}/runs/{run}"
        flags = [f"--workdir={folder}", f"--folder={folder}/{kind}", f"--autoattack={attack}", "--audit=0"]
        return Job(f"{kind}-{run}", ("experiments/evaluate.py", *flags, *path(file)), after=f"train-{run}")

    full = "apgd_ce,apgd_t" if toy else "standard"
    runs = [f"{usual}-{method}" for method in ("at", "robal_n", "robal_r")]
    jobs = [job for run in runs for job in (train(run), evaluate(run, "evaluation", "robal_aa"))]
    jobs += [evaluate(run, "autoattack_1000", full, "cifar10-1000") for run in runs]
    if large:
        run = f"{large}-robal_n"
        jobs += [train(run), evaluate(run, "evaluation", "robal_aa")]
        jobs += [evaluate(run, "autoattack_1000", full, "cifar10-1000")]
        jobs += [evaluate(run, "autoattack", full) for run in runs]
    return jobs


def status_of(name: str, work: pathlib.Path) -> str:
    """Of a job: 'done', or how it failed; '' until it has ended."""
    try:
        return (work / "ended" / name).read_text()
    except OSError:
        return ""


def run_job(job: Job, work: pathlib.Path, seconds: float) -> str:
    """Runs a job for at most so long; returns 'done' or how it failed, '' if it was stopped and can go on."""
    log = work / "logs" / f"{job.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(work / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **job.environment,
    }
    command, stopped = [sys.executable, *job.arguments], False
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(  # a group of its own, so that what it starts is stopped with it
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:  # also where this process is told to end
            stop(process)
    if stopped:
        return "" if job.seconds is None else f"failed: longer than {seconds:.0f} s"
    return "done" if process.returncode == 0 else f"failed: status {process.returncode}"


def stop(process: subprocess.Popen) -> None:
    """SIGTERM to a process and all that it started, if it still runs; SIGKILL if it does not end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


def run(jobs: Iterable[Job], work: pathlib.Path, out: pathlib.Path, seconds: float) -> None:
    """Does what is not done yet, in order, until the time is over."""
    end = time.monotonic() + seconds
    for job in jobs:
        left = end - time.monotonic()
        ready = not job.after or status_of(job.after, work) == "done"
        if status_of(job.name, work) or not ready or left < (job.seconds or SHORTEST):
            continue
        print(f"== {job.name}, {left:.0f} s left", flush=True)
        status = run_job(job, work, job.seconds or left)
        print((work / "logs" / f"{job.name}.txt").read_text(errors="replace")[-1500:].strip())
        took = left - (end - time.monotonic())
        print(f"== {job.name}: {status or 'stopped, to be resumed'}, {took:.0f} s\n", flush=True)
        if status:
            (work / "ended").mkdir(exist_ok=True)
            (work / "ended" / job.name).write_text(status)
        collect(work, out)


def collect(work: pathlib.Path, out: pathlib.Path) -> None:
    """Packs what a person reads: no checkpoints and no images."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "new.tar.gz", "w:gz") as tar:
        for folder in ("ended", "logs", "results", "runs"):
            for file in sorted((work / folder).rglob("*")):
                wanted = file.suffix in COLLECTED and "checkpoints" not in file.parts
                if (wanted or folder == "ended") and file.is_file() and file.stat().st_size < COLLECTED_BYTES:
                    tar.add(file, file.relative_to(work))
    (out / "new.tar.gz").replace(out / "accelerator.tar.gz")


def digest(path: pathlib.Path) -> str:
    """sha256 of CIFAR-10-LT as the library reads it."""
    import numpy as np

    from robal_jax.data import cifar

    arrays = cifar.load_cifar_lt("cifar10", str(path))[:4]
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def pack(data: pathlib.Path, carried: pathlib.Path) -> None:
    """Collects the wheels, and the images of CIFAR-10-LT as lossless WebP, which Pillow itself reads."""
    import numpy as np
    from PIL import Image

    from robal_jax.data import long_tailed_counts, long_tailed_indices

    wheels = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    wheels += [f"--platform=manylinux_2_{number}_x86_64" for number in (28, 27, 24, 17)]
    wheels += ["--platform=manylinux2014_x86_64", f"--dest={carried / 'wheels'}", *WHEELS]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wheels], check=True)
    with np.load(data) as file:
        arrays = dict(file)
    kept = long_tailed_indices(arrays["train_labels"], long_tailed_counts(5000, 10, 0.02))
    for split, images in (("train", arrays["train_images"][kept]), ("test", arrays["test_images"])):
        filled = np.pad(images, [(0, -len(images) % SHEET[1]), (0, 0), (0, 0), (0, 0)])
        for number, some in enumerate(np.split(filled, range(SHEET[0], len(filled), SHEET[0]))):
            picture = some.reshape(-1, SHEET[1], 32, 32, 3).swapaxes(1, 2).reshape(-1, SHEET[1] * 32, 3)
            name = carried / f"{split}-{number:02d}.webp"
            Image.fromarray(picture).save(name, lossless=True, quality=75, method=4, exact=True)
    labels = {name: arrays[name].astype(np.uint8) for name in ("train_labels", "test_labels")}
    np.savez_compressed(carried / "labels.npz", kept=kept, digest=np.array(digest(data)), **labels)
    for pattern in ("wheels/*.whl", "*.webp", "*.npz"):
        size = sum(file.stat().st_size for file in carried.glob(pattern))
        print(f"{size / 2**20:6.1f} MiB  {carried / pattern}")


def setup(carried: pathlib.Path, work: pathlib.Path) -> None:
    """Installs what the machine lacks, unpacks the data, says what the machine is."""
    from pip._vendor.packaging.requirements import Requirement  # packaging itself may be lacking

    def lacks(wheel: str) -> bool:
        needed = Requirement(wheel)
        try:
            return not needed.specifier.contains(importlib.metadata.version(needed.name))
        except importlib.metadata.PackageNotFoundError:
            return True

    lacking = [wheel for wheel in WHEELS if lacks(wheel)]
    print(f"the machine lacks {', '.join(lacking) or 'nothing'}", flush=True)
    offline = ["--no-index", "--no-deps", f"--find-links={carried / 'wheels'}", "--upgrade"]
    if lacking:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *offline, f"--target={work / 'site'}"]
        subprocess.run([*pip, *lacking], check=True)
    sys.path.insert(0, str(work / "site"))
    unpack(carried, work)
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    from experiments.benchmarks import measure

    print(measure.heading())


def unpack(carried: pathlib.Path, work: pathlib.Path) -> None:
    """cifar10.npz, where images outside of the subset are black; cifar10-1000.npz with 1,000 test images."""
    import numpy as np
    from PIL import Image

    def images(split: str, count: int) -> np.ndarray:
        pictures = [np.asarray(Image.open(file)) for file in sorted(carried.glob(f"{split}-*.webp"))]
        rows = np.concatenate(pictures).reshape(-1, 32, SHEET[1], 32, 3)
        return rows.swapaxes(1, 2).reshape(-1, 32, 32, 3)[:count]

    with np.load(carried / "labels.npz") as file:
        arrays = dict(file)
    kept, labels, tests = (arrays[name] for name in ("kept", "train_labels", "test_labels"))
    train, test = np.zeros((len(labels), 32, 32, 3), np.uint8), images("test", len(tests))
    train[kept] = images("train", len(kept))
    work.mkdir(parents=True, exist_ok=True)
    for name, count in (("cifar10", len(tests)), ("cifar10-1000", 1000)):
        some = {"test_images": test[:count], "test_labels": tests[:count]}
        np.savez(work / f"{name}.npz", train_images=train, train_labels=labels, **some)
    if digest(work / "cifar10.npz") != str(arrays["digest"]):
        sys.exit("error: the unpacked images are not those that were packed; pack them again")
    print(f"CIFAR-10-LT: {len(kept)} images to train on, {len(tests)} to test; sha256 as it was packed")


def main(arguments: Sequence[str]) -> None:
    """Flags to a stage."""
    parser = argparse.ArgumentParser(  # cli.parse needs ml_collections, which setup installs
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", required=True, choices=("pack", "setup", "run", "status"))
    parser.add_argument("--minutes", type=float, default=9.0)
    for name, value in {
        "carried": "runs/carried",
        "data": "cifar10.npz",
        "work": pathlib.Path(tempfile.gettempdir(), "robal"),
    }.items():
        parser.add_argument(f"--{name}", type=pathlib.Path, default=value)
    for name, value in {"only": "", "precision": "default", "toy": ""}.items():
        parser.add_argument(f"--{name}", default=value)
    given = parser.parse_args(arguments)
    work, toy = given.work.absolute(), given.toy == "yes"
    if given.stage == "pack":
        return pack(given.data, given.carried)
    if given.stage == "setup":
        return setup(given.carried, work)
    jobs = [*benchmarks(work, toy), *real_runs(work, toy, given.precision)]
    jobs = [job for job in jobs if job.name.startswith(tuple(given.only.split(",")))]
    if given.stage == "run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run_job stops its process
        run(jobs, work, pathlib.Path(os.environ.get("OUT", "runs/out")), 60 * given.minutes)
    for job in jobs:
        print(f"{job.name:32s} {status_of(job.name, work) or 'to do'}")


if __name__ == "__main__":
    main(sys.argv[1:])
