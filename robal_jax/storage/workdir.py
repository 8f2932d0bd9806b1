"""The folder of a run: its layout, which runs may use it, and the checkpoints in it.

::

    WORKDIR/
      config.json         the resolved config
      versions.json       versions, commit, device and processor, the sha256 of the data and of the user's
                          own modules, and the number of steps; after an import import.json
      metrics.jsonl       one line per dispatch
      tensorboard/        the same for TensorBoard
      tracked.txt         with --track: name of the run at the tracker
      checkpoints/STEP/   the newest checkpoints
      best/STEP/          the best checkpoint on held-out images, if the training looked at them; best.json
      damaged/            checkpoints that could not be read
      evaluation/         results.json, examples.npz, adversarial.npz, audit.npz, per_class.csv, report.html,
                          report.md; if asked for, corrupted.npz, certified.npz, optimality.npz
        unfinished/       the state of an interrupted evaluation
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

import robal_jax
from robal_jax import averages
from robal_jax.data import Dataset, Images, image_folder
from robal_jax.devices import hosts
from robal_jax.errors import InputError, one_line
from robal_jax.storage import buckets, checkpoints, config_file
from robal_jax.storage.claims import check_run
from robal_jax.storage.files import json_object, reason, write_whole
from robal_jax.storage.names import CHECKPOINTS, CONFIG, DAMAGED, IMPORT, VERSIONS

T = TypeVar("T")

MOST = 12  # differences that a message lists


def versions() -> dict[str, str]:
    """Returns what a result may depend on: versions, the commit of a checkout, device and processor."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    commit = git_commit(pathlib.Path(robal_jax.__file__).parents[1])
    settings = {  # of JAX, if they are not the usual ones
        "x64": "on" if jax.config.jax_enable_x64 else "",  # type: ignore[attr-defined]
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }
    return {
        "robal_jax": robal_jax.__version__,
        **({"commit": commit} if commit else {}),
        **{name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        **{name: value for name, value in settings.items() if value},
    }


def git_commit(root: pathlib.Path) -> str:
    """Returns the commit of a checkout, followed by '-dirty' if files were changed; '' if there is none."""
    if not (root / ".git").exists():  # an installed package may lie in a folder of another repository
        return ""
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # no git, or not ours to read
        return ""
    return done.stdout.strip()


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def fingerprint(images: Images) -> np.ndarray:
    """Returns the array that represents images in a digest: the pixels, or the files' names and sizes."""
    return images.identity() if isinstance(images, image_folder.ImageFiles) else np.asarray(images)


def data_digest(data: Dataset) -> str:
    """Returns the sha256 of the training set and the test set."""
    fields = data._asdict()
    arrays = {name: fields[name] for name in ("train_labels", "test_labels")}
    files = {name: fingerprint(fields[name]) for name in ("train_images", "test_images")}
    return checkpoints.digest(arrays | files)


def digest_of_images(images: Images, labels: np.ndarray) -> str:
    """Returns the sha256 of images and their labels, such as a test set or generated images."""
    return checkpoints.digest({"images": fingerprint(images), "labels": labels})


def make_workdir(workdir: pathlib.Path) -> None:
    """Makes the folder of a run, if there is none.

    Raises:
      InputError: it cannot be written to, or what is there is not of a run.
    """
    check_run(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        writable = os.access(workdir, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(
            f"cannot make workdir {workdir} ({reason(error, workdir)}); choose another workdir"
        ) from error
    if not writable:
        raise InputError(f"workdir {workdir} is not writable; choose another workdir")


def check_there(workdir: pathlib.Path, checkpoint: pathlib.Path | None = None) -> None:
    """Checks that the folder of a run, and a checkpoint if one is given, are still where they were made.

    Raises:
      InputError: they are not.
    """
    for path in filter(None, (workdir / CONFIG, checkpoint)):
        if not path.exists():
            raise InputError(
                f"{path} is gone: {workdir} was moved or removed while it was used; move it back and run the "
                "same command again, or choose another folder"
            )


def prepare_workdir(
    config: ConfigDict,
    digest: str,
    workdir: pathlib.Path,
    more: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
) -> str:
    """Makes the folder of a run, or checks that it belongs to this run.

    Args:
      config: the resolved config.
      digest: sha256 of the data.
      workdir: folder of the run.
      more: what is stored beside the digest, because an evaluation cannot find it out: 'held_out', which
        training images are held out, in words; 'generated_sha256' of generated images, and 'class_counts' of
        what training sees with them; the digests of ``user_code.code_of``.
      total_steps: of the whole run, stored for :func:`unfinished`. A run that has made them keeps its
        evaluation in its config.

    Returns:
      A line for the user, if the run keeps another evaluation than that of ``config``; or ''.

    Raises:
      InputError: the folder cannot be written to, or was made with a different config or different data.
    """
    make_workdir(workdir)
    made = checkpoints.steps(workdir / CHECKPOINTS)
    path, data, kept = workdir / CONFIG, {"data_sha256": digest, **(more or {})}, ""
    if path.exists():
        _check_same_run(config, data, workdir)
        if made[-1:] == [total_steps]:
            there = config_file.read_config(workdir)
            kept = _what_is_kept(config, there, path)
            config = config_file.with_evaluation_of(config, there)
    elif made:
        raise InputError(f"workdir {workdir} has checkpoints but no {CONFIG}; choose another workdir")
    if not made:  # all steps are made with what is here now
        length = {} if total_steps is None else {"total_steps": total_steps}
        content = json.dumps({**versions(), **data, **length}, indent=2) + "\n"
        write_whole(workdir / VERSIONS, content.encode())
    write_whole(path, config_file.to_json(config).encode())
    return kept


def _what_is_kept(config: ConfigDict, there: ConfigDict, path: pathlib.Path) -> str:
    """Returns a line with the fields of a finished run that another config does not replace; or ''."""
    changed = config_file.evaluated_differently(config, there)
    listed = [f"{name}: {old!r}, not {new!r}" for name, new, old in changed]
    if not listed:
        return ""
    more = f"; and {len(listed) - MOST} more" if len(listed) > MOST else ""
    return (
        f"the run is finished, so {path} keeps its evaluation ({'; '.join(listed[:MOST])}{more}); give "
        "--config.evaluation.* to python experiments/evaluate.py instead"
    )


def _check_same_run(config: ConfigDict, data: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Raises if a workdir was made with a different config or different data."""
    try:
        stored = json.loads((workdir / VERSIONS).read_text())
        before = {
            "data": str(stored["data_sha256"]),
            "generated data": str(stored.get("generated_sha256", "")),
        }
    except FileNotFoundError as error:
        raise InputError(
            f"workdir {workdir} was not made by training; to fine-tune its weights, choose another workdir "
            f"and set config.train.start_from={workdir}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"cannot read {workdir / VERSIONS} ({one_line(error)}); choose another workdir"
        ) from error
    there = config_file.read_config(workdir)
    changed = config_file.differences(config, there) + config_file.judged_differently(config, there)
    now = {"data": data["data_sha256"], "generated data": data.get("generated_sha256", "")}
    if not changed:
        changed = [
            f"{name}: sha256 {now[name][:12]}… here, {before[name][:12]}… there"
            for name in now
            if now[name] != before[name]
        ]
    if changed:
        more = f"; and {len(changed) - MOST} more" if len(changed) > MOST else ""
        raise InputError(
            f"workdir {workdir} was made with a different config ({'; '.join(changed[:MOST])}{more}); "
            "choose another workdir, or use the same config to resume"
        )


def check_same_model(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checks that an evaluation's config is that of the run, but for what an evaluation may set.

    Raises:
      InputError: the config changes a field of the model, the data or the training.
    """
    if not (workdir / CONFIG).exists():
        return
    changed = config_file.evaluates_another_run(config, config_file.read_config(workdir))
    if changed:
        raise InputError(
            f"an evaluation cannot change the run {workdir} ({'; '.join(changed)}); set only fields of "
            "config.evaluation (evaluation.epsilon for another radius, evaluation.head for another head), "
            "config.method, the paths of the data, config.train.select and config.train.layout, or train "
            "another run"
        )


def imported_from(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns what an imported run says of its weights: 'weights', 'weights_sha256', 'network' and more.

    None for a run that was trained here; {} if the file cannot be read.
    """
    return json_object(workdir / IMPORT) if (workdir / IMPORT).exists() else None


def origin_of(workdir: pathlib.Path) -> str:
    """Says where the weights of an imported run are from; '' if they were trained here, or nothing tells."""
    origin = imported_from(workdir) or {}
    names = ("weights", "network", "weights_sha256")
    weights, network, sha256 = (origin.get(name) for name in names)
    return f"{weights}, a {network}, sha256 {sha256}" if weights and network and sha256 else ""


def unfinished(workdir: pathlib.Path) -> str:
    """Says that a run was trained here but not to its end; '' if it was, or if nothing tells."""
    total = json_object(workdir / VERSIONS).get("total_steps")
    newest = checkpoints.steps(workdir / CHECKPOINTS)[-1:]
    if type(total) is not int or not newest or newest[0] >= total:
        return ""
    return f"step {newest[0]} of {total}: the training is not finished"


def check_same_data(
    digest: str, workdir: pathlib.Path, say: Callable[[str], None], generated: str | None = None
) -> None:
    """Checks that an evaluation has the data of the run.

    Args:
      digest: sha256 of its data, see :func:`data_digest`.
      workdir: folder of the run.
      say: receives a warning if the run does not name its data; an imported run gives none.
      generated: sha256 of generated images, '' for none; None, as of an evaluation, compares nothing.

    Raises:
      InputError: the data are different.
    """
    imported = imported_from(workdir)
    if not (workdir / CONFIG).exists() or (imported is not None and "data_sha256" not in imported):
        return
    try:
        trained_on = imported or json.loads((workdir / VERSIONS).read_text())
        there = {"data": trained_on["data_sha256"], "generated": trained_on.get("generated_sha256", "")}
    except (OSError, ValueError, KeyError, TypeError):
        say(f"warning: {workdir / VERSIONS} does not say which data the run was trained on")
        return
    for section, here in (("data", digest), ("generated", generated)):
        if here is not None and there[section] != here:
            what = "data" if section == "data" else "generated images"
            raise InputError(
                f"the {what} differ from those of the run {workdir} (sha256 {here[:12] or 'none'}… here, "
                f"{str(there[section])[:12] or 'none'}… there); restore them, or name their place in "
                f"config.{section}.path"
            )


def class_counts_in_training(workdir: pathlib.Path) -> np.ndarray | None:
    """Returns the class counts of the mixture that a run was trained on; None without generated images."""
    try:
        imported = imported_from(workdir)
        trained = json.loads((workdir / VERSIONS).read_text()) if imported is None else imported
        counts = trained.get("class_counts")
        return None if counts is None else np.array(counts, float)
    except (OSError, ValueError, AttributeError, TypeError):  # check_same_data says that it cannot be read
        return None


def newest_whole(workdir: pathlib.Path, like: T, say: Callable[[str], None]) -> checkpoints.Found[T] | None:
    """Restores the newest undamaged checkpoint, if there is any, and moves newer damaged ones away.

    Lists the digests of the checkpoint's files if a job was killed before it did.
    """
    damaged: list[tuple[pathlib.Path, str]] = []
    found = checkpoints.restore_latest(
        workdir / CHECKPOINTS, like, on_damage=lambda path, why: damaged.append((path, why))
    )
    # A folder of a drive that all share has a config by now; copies of a bucket were made before.
    shared = buckets.url_of(workdir) is not None or (workdir / CONFIG).is_file()
    state = found.sha256 if found else "none"
    hosts.check_agreement(f"what is in {buckets.shown(workdir)}", f"{shared} {state}")
    for path, why in damaged:
        hosts.by_first(partial(_set_aside, workdir, say, path, why))
    if found:
        hosts.by_first(partial(checkpoints.list_digests, found.path))
    return found


def _set_aside(workdir: pathlib.Path, say: Callable[[str], None], path: pathlib.Path, why: str) -> None:
    """Moves a damaged checkpoint away, so that a new one can be written in its place."""
    target = workdir / DAMAGED / f"{path.name}-{time.strftime('%Y%m%dT%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    say(f"checkpoint {path} is damaged ({why}); moved to {target}, passing it over")


def restore_weights(
    workdir: pathlib.Path,
    checkpoint: pathlib.Path | None,
    like: dict[str, Any],
    say: Callable[[str], None],
    which: str = "current",
) -> checkpoints.Found[dict[str, Any]]:
    """Reads the weights of a run's checkpoint, without the state of its optimiser.

    Args:
      workdir: folder of the run.
      checkpoint: folder of one checkpoint; the newest undamaged one if None.
      like: ``params`` and ``stats`` of the model, arrays or their shapes.
      say: receives messages for the user.
      which: one of ``averages.WEIGHTS``.

    Returns:
      ``params`` and ``stats``, with the checkpoint's folder and its sha256.

    Raises:
      InputError: there is no such checkpoint, it is damaged, or it belongs to a different model.
    """
    part = partial(averages.chosen, which=which)
    if checkpoint is None:
        found = checkpoints.restore_latest(
            workdir / CHECKPOINTS,
            like,
            on_damage=checkpoints.previous_instead(say),
            part=part,
        )
        if found is None:
            raise InputError(f"no checkpoint in {workdir / CHECKPOINTS}; train first, or name a checkpoint")
    elif checkpoint.is_file():
        raise InputError(
            f"checkpoint {checkpoint} is a file; give a checkpoint's folder, or import weights with "
            "python experiments/import_torch.py"
        )
    elif not checkpoint.is_dir():
        raise InputError(f"no checkpoint {checkpoint}; correct its name, or leave it out for the newest")
    else:
        try:
            tree, sha256 = checkpoints.restore(checkpoint, like, part=part)
        except checkpoints.DamagedCheckpointError as error:
            raise InputError(
                f"checkpoint {checkpoint} is damaged ({error}); name another checkpoint"
            ) from error
        found = checkpoints.Found(tree, checkpoint, sha256)
    hosts.check_agreement(f"checkpoint {found.path}", found.sha256)
    return found
