"""From a run and its evaluations to the three files of a model."""

import datetime
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from robal_jax import exchange, pytorch
from robal_jax.errors import InputError, one_line
from robal_jax.evaluation import Run, load_run
from robal_jax.reporting.results import Results, json_text, results_folder
from robal_jax.storage.config_file import read_config
from robal_jax.storage.files import check_replaceable, json_object, reason, write_whole
from robal_jax.storage.names import EVALUATION, VERSIONS
from robal_jax.storage.workdir import class_counts_in_training, imported_from
from robal_jax.zoo import cards
from robal_jax.zoo.models import ENDINGS, NAME, load_model, read_card

MARKS = ('"checkpoint_sha256":', '"weights_sha256":', '"number_forward_passes":')
"""Texts in the beginnings of the three files, in the order of ``ENDINGS``."""

INFERENCE = ("weights", "head", "logit_scale", "tau_p")
"""Fields of ``config.evaluation`` that belong to the model."""


def publish(
    workdir: pathlib.Path,
    out: pathlib.Path,
    evaluations: Mapping[str, pathlib.Path] | None = None,
    *,
    authors: str = "",
    license: str = "",
) -> list[pathlib.Path]:
    """Writes the weights of a run that its config evaluates, their card, and the card for RobustBench.

    A run that was made from the model at ``out`` adds its evaluations to the card; the weights stay.

    Args:
      workdir: folder of a run that was trained here, or made from the model at ``out``. Its data set is
        read, for a model from where its evaluation has it.
      out: ``FOLDER/NAME``, the files without their endings; the model's name is that of the folder and NAME.
      evaluations: folders of results of this run, by the names that the card gives them; if None, that in
        ``workdir``.
      authors: of the model, for the card for RobustBench; '' for what the earlier one at ``out`` says, or
        'N/A'.
      license: of the weights, for the card; '' for what the earlier one says, or 'not stated'.

    Returns:
      The files that were written.

    Raises:
      InputError: the run, an evaluation or a file cannot be used.
    """
    name = f"{out.absolute().parent.name}/{out.name}"
    if not re.fullmatch(NAME, name) or name.endswith(ENDINGS):
        raise InputError(
            f"--out is {out}; name the files without their endings, FOLDER/NAME, of letters, digits, '_', "
            "'-' and '.'"
        )
    files = [out.with_name(f"{out.name}{ending}") for ending in ENDINGS]
    for file, mark in zip(files, MARKS, strict=True):
        check_replaceable(file, mark)
    read_config(workdir)  # says what is wrong with a folder that is no run
    imported = imported_from(workdir)
    if imported is not None and not _is_of_model(imported, files[1]):
        raise InputError(
            f"the weights of {workdir} were imported; publish a run that was trained here, or name in --out "
            "the model that they are of"
        )
    folders = evaluations or {EVALUATION: workdir}
    results = {key: _results_of_a_run(folder) for key, folder in folders.items()}
    made_with = _versions(workdir) if imported is None else {}
    lead = next(iter(results.values())).meta["config"]
    run = load_run(workdir, data_path=None if imported is None else lead["data"].get("path"))
    for key, folder in folders.items():
        _check_is_of(run, str(folder), results[key])
    weights_file, card_file, robustbench_file = files
    authors = authors or str(json_object(robustbench_file).get("authors") or cards.NO_AUTHORS)
    license = license or str(json_object(card_file).get("license") or cards.NO_LICENSE)
    if imported is not None:
        return _with_more_figures(files, results, authors, license)

    config = ConfigDict(cards.without_paths(run.config)).lock()
    origin = {"name": name, "checkpoint_sha256": run.sha256}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        state_dict = exchange.export_weights(weights_file, config, run.params, run.stats, origin)
        network = pytorch.architecture(pytorch.shapes(state_dict))
        architecture = network.name if network.model else str(run.config["model"]["name"])
        images = cards.check_images(run.test.images.shape[1:], run.test.pixel_max)
        logits = run.logits(images)
        card = {
            "name": name,
            "weights_sha256": hashlib.sha256(weights_file.read_bytes()).hexdigest(),
            "network": architecture,
            **_described(workdir, run, results, made_with, license),
            "check": cards.check_of(images, logits, cards.tolerance(state_dict, logits)),
        }
        write_whole(card_file, json_text(card).encode() + b"\n")
        for_robustbench = cards.robustbench(cards.leading(list(results.values())), architecture, authors)
        write_whole(robustbench_file, (json.dumps(for_robustbench, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write {out} ({reason(error, out)}); choose another --out") from error
    load_model(card_file, trust_code=True).check()
    return files


def _results_of_a_run(folder: pathlib.Path) -> Results:
    """Reads the results of an evaluation that has a config."""
    results = Results.read(results_folder(folder))
    if "config" not in results.meta:
        raise InputError(f"{folder} was made by evaluate_model; name an evaluation of this run")
    return results


def _is_of_model(imported: Mapping[str, Any], card_file: pathlib.Path) -> bool:
    """Returns whether a run's weights are those of a model."""
    try:
        card = read_card(card_file)
    except InputError:
        return False
    return bool(imported.get("weights_sha256") == card["weights_sha256"])


def _with_more_figures(
    files: list[pathlib.Path], results: Mapping[str, Results], authors: str, license: str
) -> list[pathlib.Path]:
    """Adds evaluations to the cards of a model; those of the same names are replaced.

    The card for RobustBench has one evaluation, which is replaced by one that ranks at least as high as all
    that the card keeps, see :func:`cards.rank`, or if the card no longer has it.

    Returns:
      The files that were written.
    """
    _, card_file, robustbench_file = files
    card, lead = read_card(card_file), cards.leading(list(results.values()))
    kept = {name: each for name, each in card["evaluations"].items() if name not in results}
    ranks = [cards.rank(each, each["conditions"], card["config"]) for each in kept.values()]
    leads = cards.rank(lead.meta, lead.conditions, card["config"]) >= max(ranks, default=(False,))
    leads |= next(iter(card["evaluations"]), "") in results  # the first is the one in RobustBench's card
    more = {name: cards.figures(each) for name, each in results.items()}
    card["evaluations"] = cards.in_order(more | kept, card["config"])
    card["license"], earlier = license, json_object(robustbench_file)
    made = cards.robustbench(lead, card["network"], authors) if leads or not earlier else earlier
    made = made | {"authors": authors}
    texts = {card_file: json_text(card)}
    if made != earlier:
        texts[robustbench_file] = json.dumps(made, indent=2)
    try:
        for file, text in texts.items():
            write_whole(file, f"{text}\n".encode())
    except OSError as error:
        raise InputError(f"cannot write {card_file} ({reason(error, card_file)})") from error
    return list(texts)


def _described(
    workdir: pathlib.Path, run: Run, results: Mapping[str, Results], made_with: dict[str, Any], license: str
) -> dict[str, Any]:
    """Returns what a card says of the model, its data and its figures."""
    meta, data = next(iter(results.values())).meta, str(run.config["data"]["name"])
    mixture = class_counts_in_training(workdir)
    return {
        "method": meta["method"],
        "license": license,
        "published": datetime.date.today().isoformat(),
        "data": {
            "name": data,
            "sha256": made_with.pop("data_sha256"),
            "license": cards.DATA_LICENSES.get(data, "see the data set; no image is included"),
            "imbalance": meta["imbalance"],
            "images": list(run.test.images.shape[1:]),
            "pixel_max": run.test.pixel_max,
            "classes": list(run.test.class_names),
            "class_counts": run.test.class_counts.tolist(),
            **({} if mixture is None else {"trained_counts": mixture.tolist()}),
            **{key: meta[key] for key in ("held_out", "generated") if key in meta},
        },
        "checkpoint": {
            "sha256": run.sha256,
            "step": run.checkpoint.name,
            "weights": run.config["evaluation"]["weights"],
            **{key: meta[key] for key in ("selection", "selected_on_test") if key in meta},
        },
        "trained_with": {key: made_with[key] for key in made_with if isinstance(made_with[key], str)},
        "config": cards.without_paths(run.config),
        "evaluations": cards.in_order(
            {name: cards.figures(each) for name, each in results.items()}, run.config
        ),
    }


def _versions(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads what a run was trained with, and the digest of its data."""
    try:
        found = dict(json.loads((workdir / VERSIONS).read_text()))
        return {**found, "data_sha256": str(found["data_sha256"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"cannot read {workdir / VERSIONS} ({one_line(error)}); restore it, or train the run again"
        ) from error


def _check_is_of(run: Run, name: str, results: Results) -> None:
    """Checks that an evaluation is of the weights that are published, as the config evaluates them.

    Raises:
      InputError: it is not.
    """
    sha256 = str(results.meta.get("checkpoint_sha256"))
    if sha256 != run.sha256:
        raise InputError(
            f"{name} is of another checkpoint (sha256 {sha256[:12]}…; the run's is {run.sha256[:12]}…); "
            "evaluate the run again, or name another evaluation"
        )
    theirs, ours = results.meta["config"]["evaluation"], run.config["evaluation"]
    changed = [field for field in INFERENCE if theirs.get(field, ours[field]) != ours[field]]
    if changed:
        raise InputError(
            f"{name} changes config.evaluation.{changed[0]} of the run, so it is of another model; name "
            "another evaluation"
        )
