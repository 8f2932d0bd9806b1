"""The package: what a wheel holds, the console command, the configs by name, the version in one place.

.ci/run builds the wheel and uses it; here the folders of setup.cfg are laid out like it.
"""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import robal_jax
from robal_jax import cli, console
from robal_jax.errors import InputError

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = SETUP["options"]["packages"].split()
FOLDERS = dict(re.findall(r"(\S+) = (\S+)", SETUP["options"]["package_dir"]))
"""Folders of the packages that lie elsewhere in the repository."""


def folder_of(package):
    return ROOT / FOLDERS.get(package, package.replace(".", "/"))


def data_files(package):
    """Files of a package that are not Python."""
    patterns = SETUP["options.package_data"].get(package, "").replace(",", " ").split()
    return {path for pattern in patterns for path in folder_of(package).glob(pattern)}


# ---------------------------------------------------------------- the wheel


def test_every_folder_is_in_the_wheel():
    modules = sorted(path.parent for path in (ROOT / "robal_jax").rglob("__init__.py"))
    names = [".".join(folder.relative_to(ROOT).parts) for folder in modules]
    assert sorted(PACKAGES) == sorted([*names, *FOLDERS])


def test_the_wheel_has_what_the_commands_need():
    assert FOLDERS == {
        "robal_jax.shipped.configs": "configs",
        "robal_jax.shipped.experiments": "experiments",
        "robal_jax.shipped.experiments.paper": "experiments/paper",
    }
    assert data_files("robal_jax.shipped.experiments") == {
        path for path in (ROOT / "experiments" / "zoo").rglob("*") if path.is_file()
    }
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert scripts == {script for script, _ in console.COMMANDS.values()}
    assert data_files("robal_jax") == {ROOT / "robal_jax" / "py.typed"}
    assert (ROOT / SETUP["metadata"]["license_files"]).is_file()


MY_METHOD = """
from configs import at, base

def loss(logits, labels, power):
    return logits[:, 0] * power

def get_config(data="digits_lt"):
    config = at.get_config(data)
    config.loss = base.ConfigDict({"name": "my_method:loss", "power": 0.5})
    return config
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs the console command with the package as a wheel lays it out, from another folder."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("folder")
    for name in PACKAGES:
        target = site.joinpath(*name.split("."))
        target.mkdir(parents=True)
        for path in {*folder_of(name).glob("*.py"), *data_files(name)}:
            place = target / path.relative_to(folder_of(name))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    (folder / "my_method.py").write_text(MY_METHOD)
    (folder / "configs").mkdir()  # a user's own package of that name
    (folder / "configs" / "__init__.py").write_text("")
    (folder / "configs" / "mine.py").write_text("from configs import at\n\nget_config = at.get_config\n")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", "from robal_jax.console import main; main()", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{folder}"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; use train"),
        (["xyz"], "unknown command 'xyz'; use one of train, evaluate, "),
        (["train"], "--config is missing; usage: Train: robal-jax train --config=METHOD:DATA"),
        (["train", "--config=at", "--workdir=x", "--config.sed=1"], "use 'seed'"),
        (
            ["train", "--config=my_method.py", "--workdir=x", "--config.loss.powr=1"],
            "'my_method:loss' takes no 'powr'",
        ),
        (
            ["train", "--config=configs/mine.py:cifar10_lt", "--workdir=x", "--config.sed=1"],
            "use 'seed'",
        ),
        (["train", "--config=configs/at.py", "--workdir=x"], "no config file configs/at.py; use at"),
        (["reproduce", "--table=1", "--config.seed=1"], "config.seed is set by --seeds"),
        (["evaluate", "--model=digits_lt/at"], "no model 'digits_lt/at' in the zoo, and no such files; use "),
    ],
)
def test_one_line_from_another_folder(installed, arguments, message):
    result = installed(*arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert re.fullmatch("error: .*\n", result.stderr), result.stderr
    assert message in result.stderr


# ---------------------------------------------------------------- the console command


@pytest.mark.slow
def test_help_starts_without_jax():
    code = """
import sys
from robal_jax import console
for name in ("", *console.COMMANDS):
    sys.argv = ["robal-jax", *filter(None, [name]), "--help"]
    try:
        console.main()
    except SystemExit as stopped:
        assert stopped.code == 0
    assert "jax" not in sys.modules or name == "prepare", name
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name in console.COMMANDS:
        assert re.search(rf"^  {name} +\w", result.stdout, re.MULTILINE)
        assert f"robal-jax {name} " in result.stdout
    assert "python experiments" not in result.stdout


def test_version(capsys):
    console.start(["--version"])
    assert capsys.readouterr().out == f"{robal_jax.__version__}\n"
    console.start([])
    assert capsys.readouterr().out.startswith("usage: robal-jax COMMAND ")


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        (
            "python experiments/train.py --config=configs/at.py:digits_lt --workdir=configs/at.py",
            "robal-jax train --config=at:digits_lt --workdir=configs/at.py",
        ),
        ("python experiments/import_torch.py --weights=x", "robal-jax import --weights=x"),
        (
            "get it with `python experiments/prepare_data.py --dataset=x`",
            "get it with `robal-jax prepare --dataset=x`",
        ),
        ("no config file configs/at.py", "no config file configs/at.py"),
    ],
)
def test_commands_are_named_as_they_were_started(monkeypatch, text, rewritten):
    assert cli.as_started(text) == text
    monkeypatch.setattr(sys, "argv", ["robal-jax train"])
    assert cli.as_started(text) == rewritten


# ---------------------------------------------------------------- configs by name


def test_configs_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.load_config("robal_n:cifar10_lt").method == "RoBal-N"
    (tmp_path / "configs").mkdir()
    mine = (ROOT / "configs" / "at.py").read_text().replace("return", "raise ValueError('mine')\n    return")
    for name in ("at.py", "configs/at.py"):
        (tmp_path / name).write_text(mine)
    for spec in ("at.py", "configs/at.py"):  # a path that exists wins
        with pytest.raises(InputError, match=f"{spec}: mine"):
            cli.load_config(spec)


# ---------------------------------------------------------------- the version


def test_the_version_is_in_one_place():
    """setuptools reads it without an import, because it is a constant."""
    assert SETUP["metadata"]["version"] == "attr: robal_jax.__version__"
    nodes = ast.parse((ROOT / "robal_jax" / "__init__.py").read_text()).body
    values = [
        node.value for node in nodes if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert [ast.literal_eval(value) for value in values] == [robal_jax.__version__]


@pytest.mark.parametrize(
    ("file", "pattern"), [("CHANGELOG.md", r"^## \[?([\d.]+)"), ("CITATION.cff", r"^version: (\S+)")]
)
def test_files_of_a_release_name_the_version(file, pattern):
    found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert found and found[1] == robal_jax.__version__
