"""Arguments that were pasted from a text, numbers in other forms, and config files without their ending."""

import re
import sys

import pytest

from robal_jax import cli
from robal_jax.arguments import check_typed, plain, typed
from robal_jax.errors import InputError


@pytest.mark.parametrize(
    ("pasted", "meant"),
    [
        ("–config=at:digits_lt", "--config=at:digits_lt"),
        ("—workdir", "--workdir"),
        ("−−workdir=run", "--workdir=run"),
        ("-–workdir=run", "--workdir=run"),
        ("--print–config", "--print-config"),
        ("–config.train.epochs=1", "--config.train.epochs=1"),
        ("--workdir=“run”", "--workdir=run"),
        ("--workdir=„run“", "--workdir=run"),
        ("“--config.method=x”", "--config.method=x"),
        ("‘runs/at’", "runs/at"),
        ("--config=at\u00a0--workdir=run", "--config=at --workdir=run"),
        ("\ufeff--config=at", "--config=at"),
        ("--config=at\u200b", "--config=at"),
    ],
)
def test_what_a_text_processor_changed(pasted, meant):
    assert typed(pasted) == meant
    with pytest.raises(InputError, match=re.escape(f"; write {meant}") + "$"):
        check_typed(["--a=b", pasted])


@pytest.mark.parametrize(
    "argument",
    [
        "--workdir=ein–zwei",
        "runs/a—b",
        "--workdir=Jens’",
        "--workdir=a b",
        "-h",
        "",
        "-",
        "--",
        "--method=a“b”c",
        " x",
    ],
)
def test_what_a_keyboard_can_type_or_a_folder_be_named(argument):
    assert check_typed([argument]) == [argument]


def test_every_command_checks_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "–config=at"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda arguments: pytest.fail(f"{arguments} were accepted"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("put in; write --config=at\n")


@pytest.mark.parametrize(
    ("text", "before", "value"),
    [
        *((text, 60, 1000) for text in ("1e3", "1_000", "1000.0", " 1000 ", "+1000", "01000")),
        *((text, 0.1, 0.05) for text in ("0.05", ".05", "5e-2", "1/20", " 1 / 20 ", "0.5/10")),
        *((text, True, "false") for text in ("no", "off", "0", "False", "F", "n")),
        *((text, False, "true") for text in ("YES", "on", "1", "true", "T", "y")),
        ("1/20", "text", "1/20"),
        ("1e3", (60, 75), "1e3"),
    ],
)
def test_values_in_common_forms(text, before, value):
    assert plain(f"--a={text}", before) == f"--a={value}"


@pytest.mark.parametrize(
    ("text", "before", "message"),
    [
        ("0,1", 0.1, "is no number; write 0.1"),
        (",5", 0.1, "is no number; write .5"),
        ("5%", 0.1, "is no number; write 0.05"),
        ("0.5 %", 0.1, "is no number; write 0.005"),
        *(
            (text, 0.1, "is no number; write 0.031 or 8/255")
            for text in ("1.2.3%", "None", "", "2*4/255", "10^-1")
        ),
        *((text, 60, "is no whole number; write 1000") for text in ("1,000", "1.000", "1 000")),
        ("1.000.000", 60, "is no whole number; write 1000000"),
        *(
            (text, 60, "is no whole number; write one such")
            for text in ("2.5", "10%", "1k", "all", "nan", "inf", "")
        ),
        *((text, True, "is neither true nor false; write --a=true or") for text in ("2", "None", "")),
    ],
)
def test_values_that_are_none(text, before, message):
    with pytest.raises(InputError, match="^" + re.escape(f"--a={text} {message}")):
        plain(f"--a={text}", before)


def test_fields_and_switches_take_them():
    config = cli.load_config("at:digits_lt")
    config = cli.apply_overrides(config, ["--config.train.sync_batch_norm=off", "--config.train.epochs=1e1"])
    assert (config.train.sync_batch_norm, config.train.epochs) == (False, 10)
    for value, given in (("yes", "True"), ("off", "")):
        assert cli.parse([f"--quiet={value}"], {"quiet": ""}, "", switches=["quiet"]) == {"quiet": given}
    with pytest.raises(InputError, match="--help=train is neither true nor false"):
        cli.parse(["--help=train"], {}, "")


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("my:digits_lt", "my.py"),
        ("my_methd", "my_method.py"),
        ("my_methd.py:digits_lt", "my_method.py"),
        ("sub/c", "sub/c.py"),
        ("sub/at", "sub/at.py"),
        ("configs/at", "at"),
        ("configs.at", "at"),
        ("configs\\at.py", "at"),
        ("AT:digits_lt", "at"),
    ],
)
def test_config_files_that_are_near(tmp_path, monkeypatch, spec, meant):
    monkeypatch.chdir(tmp_path)
    for name in ("my.py", "my_method.py", "sub/c.py", "sub/at.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"no config file .*; use {re.escape(meant)}$"):
        cli.load_config(spec)
