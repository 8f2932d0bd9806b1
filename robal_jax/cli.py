"""The command line of the experiment scripts: a config with overrides, a few flags, clear errors.

ml_collections parses ``--config.field=value``; this module loads the config file, names the nearest key if a
key is unknown, and turns errors into one line.
"""

import contextlib
import difflib
import importlib.util
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from robal_jax.arguments import check_typed, plain
from robal_jax.devices.cpu import drop_unusable_cache, prepare_jax
from robal_jax.devices.output import Tolerant
from robal_jax.errors import (
    AGAIN,
    DivergedError,
    InputError,
    of_environment,
    one_line,
    place_in,
    user_path,
)
from robal_jax.storage import buckets
from robal_jax.storage.config_file import flatten, run_around
from robal_jax.storage.names import BEST, CHECKPOINTS

PROCESSES = {
    "coordinator": "with several processes: HOST:PORT of the first one; auto on a TPU slice, under Slurm, "
    "Open MPI or Kubernetes",
    "processes": "with HOST:PORT: number of processes",
    "process": "with HOST:PORT: number of this process, from 0",
}
"""Flags of scripts that can run in several processes, for ``hosts.start``."""

PRINT_CONFIG = {"print-config": "prints the config as the run would store it, and ends"}
"""A switch of ``train.py`` and ``evaluate.py``."""

NAMED = (
    "data", "model", "head", "loss", "objective", "threat.budget", "attack.loss", "optimizer", "perturbation",
    "average", "class_statistics", "schedule", "evaluation.head", "evaluation.budget",
)  # fmt: skip
"""Sections with a name, whose other fields are arguments of the function of this name."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""

QUIET_SECONDS = 5.0
"""After Ctrl-C, what libraries print is dropped for so long, unless the command ends before."""

CONSOLE = "robal-jax"
"""Name of the console command, see ``console.py``."""

_WHEEL = pathlib.Path(__file__).resolve().parent / "shipped"
SHIPPED = _WHEEL if _WHEEL.is_dir() else _WHEEL.parents[1]
"""Folder that holds ``configs`` and ``experiments``: their copy in a wheel, or the repository."""


class Done(SystemExit):
    """A command has printed all that was asked for, such as its help."""


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's ``main(arguments)``; an error becomes one line on stderr and an exit status.

    The status is 2 if an input (:class:`InputError`) or the machine (:func:`of_environment`) cannot be used,
    or if a user's own code ends Python, 3 if training diverged (:class:`DivergedError`), and 130 after
    Ctrl-C. What stdout or stderr does not take is lost, and nothing else. JAX is set up before
    (:func:`prepare_jax`), so the script must not have imported it yet.
    """
    status, message = 0, ""
    with _lasting_output() as streams, _interrupts(streams[1]) as interrupts:
        try:
            _quiet_threads()
            for warning in (*prepare_jax(os.environ), drop_unusable_cache(os.environ)):
                if warning:
                    print(f"warning: {warning}", file=sys.stderr)
            logging.set_verbosity(logging.FATAL)  # Orbax and TFDS log details through absl
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            main(check_typed(sys.argv[1:]))
        except Done:
            pass
        except BaseException as error:
            status, message = _outcome(error, interrupted=bool(interrupts))
            if not message:
                raise
            if status == INTERRUPTED:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would interrupt the end of Python
                streams[1].quiet_until = 0.0
        sys.stdout.flush()
        if status:
            text = buckets.named(" ".join(message.split()), "read")
            print("error: " + as_started(text), file=sys.stderr)
        elif lost := streams[0].lost:
            print(f"warning: stdout lost a part of the output ({one_line(lost)})", file=sys.stderr)
    if status:
        sys.exit(status)


def _outcome(error: BaseException, *, interrupted: bool) -> tuple[int, str]:
    """Returns the exit status and the message of an error; no message if it is a bug."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, DivergedError):
        return 3, str(error)
    if interrupted or isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; what was saved is intact: " + AGAIN
    if isinstance(error, SystemExit):
        return 2, _of_exit(error)
    return 2, of_environment(error) or ""


def _of_exit(error: SystemExit) -> str:
    """Says where a user's own code called ``sys.exit``, which the library never does."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "<" not in frame.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"sys.exit({error.code!r}) ended the command{where}; raise an error there, or remove the call"


@contextlib.contextmanager
def _interrupts(stderr: Tolerant) -> Iterator[list[int]]:
    """Notes each Ctrl-C that nobody else takes.

    While they are imported, some libraries print its exception, or turn it into another one.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        noted.append(number)
        stderr.quiet_until = time.monotonic() + QUIET_SECONDS
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # as of a job in the background
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if not noted:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _lasting_output() -> Iterator[list[Tolerant]]:
    """Makes stdout and stderr :class:`Tolerant`."""
    before: Any = sys.stdout, sys.stderr
    streams: Any = [Tolerant(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not any(stream.error for stream in streams):  # otherwise Python would fail at its end
            sys.stdout, sys.stderr = before


def _quiet_threads() -> None:
    """Drops the errors that threads of C++ print, such as TensorStore's for each array after a failed save.

    What failed reaches the main thread as an exception too. It stays so until the process ends, because these
    threads may outlive the command.
    """
    before = sys.unraisablehook

    def hook(error: Any) -> None:
        if error.object is not None or threading.current_thread() is threading.main_thread():
            before(error)

    sys.unraisablehook = hook


def check_shown() -> None:
    """Checks that stdout took what a command printed, for commands that make nothing else.

    Raises:
      InputError: it did not.
    """
    sys.stdout.flush()
    if lost := getattr(sys.stdout, "lost", None):
        raise InputError(f"cannot write to stdout ({one_line(lost)}); send the output elsewhere")


def as_started(text: str) -> str:
    """Rewrites the commands in a text if this process was started by the console command.

    ``python experiments/train.py --config=configs/at.py:digits_lt`` becomes
    ``robal-jax train --config=at:digits_lt``, which needs no checkout.
    """
    if not sys.argv[0].startswith(f"{CONSOLE} "):
        return text
    text = re.sub(r"python experiments/([a-z]+)(?:_torch|_data)?\.py", rf"{CONSOLE} \1", text)
    return re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", text)


def add_shipped() -> None:
    """Makes the shipped ``configs`` and ``experiments`` importable, even if others have these names."""
    if str(SHIPPED) not in sys.path:
        sys.path.insert(0, str(SHIPPED))
    for folder in (SHIPPED / "configs", SHIPPED / "experiments"):
        if folder.is_dir():
            package = importlib.import_module(folder.name)
            if str(folder) not in package.__path__:
                package.__path__.insert(0, str(folder))


PATHS = (
    "workdir",
    "folder",
    "checkpoint",
    "surrogate",
    "out",
    "html",
    "weights",
    "data_dir",
    "config",
    "model",
    "json",
    "cifar",
    "data",
    "evaluation",
)
"""Flags that name a path, in which ``~`` is the home folder, see :func:`user_path`."""


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without overrides ``--config.field=value``, and the overrides.

    Raises:
      InputError: a field is given two values.
    """
    overrides = [argument for argument in arguments if argument.lstrip("-").startswith("config.")]
    return [argument for argument in arguments if argument not in overrides], once(overrides)


def once(overrides: Sequence[str]) -> list[str]:
    """Returns overrides ``--config.field=value``, each field once.

    Raises:
      InputError: a field is given two values.
    """
    found: dict[str, str] = {}
    for override in overrides:
        field, _, value = override.lstrip("-").partition("=")
        if found.setdefault(field, value) != value:
            raise InputError(f"{field} is given as {found[field]!r} and as {value!r}; give it once")
    return [f"--{field}={value}" for field, value in found.items()]


def parse(
    arguments: Sequence[str],
    texts: dict[str, str],
    usage: str,
    *,
    switches: Collection[str] = (),
    more: Callable[[dict[str, str]], str] | None = None,
) -> dict[str, str]:
    """Parses a script's own flags.

    Args:
      arguments: without the program's name and without overrides.
      texts: name of each flag to its text in ``--help``; all flags are strings.
      usage: first lines of ``--help``.
      switches: names of the flags that take no value.
      more: from the values of the flags to the last lines of ``--help``.

    Returns:
      The values of the flags; '' for a flag that is not given, 'True' for a switch that is.

    Raises:
      InputError: a flag is unknown, empty or given two values, or an argument is not a flag.
      Done: the text of ``--help`` was printed.
    """
    values = flags.FlagValues()
    for name, text in texts.items():
        if name in switches:
            flags.DEFINE_bool(name, None, text, flag_values=values)
        else:
            flags.DEFINE_multi_string(name, None, text, flag_values=values)
    flags.DEFINE_bool("help", False, "this text", flag_values=values)
    bools = {f"--{name}" for name in (*switches, "help")}
    read = [plain(one, True) if one.partition("=")[0] in bools else one for one in arguments]
    try:
        rest = values(["", *read])[1:]
    except flags.UnrecognizedFlagError as error:
        raise InputError(_unknown_flag(error.flagname, texts, usage)) from error
    except flags.Error as error:  # such as a missing value
        raise InputError(f"{error}; write arguments as --name=value") from error
    given = {name: _single(name, values[name].value) for name in texts}
    if values["help"].value:
        print(as_started(usage))
        for name, text in texts.items():
            print(as_started(f"  --{name}: {text}"))
        if more is not None:
            print(more(given))
        check_shown()
        raise Done(0)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; write arguments as --name=value")
    return given | {
        name: str(user_path(given[name])) for name in PATHS if given.get(name, "").startswith("~")
    }


def _single(name: str, found: bool | list[str] | None) -> str:
    """Returns the value of a flag from all that it was given."""
    if not isinstance(found, list):
        return str(found or "")
    if len(set(found)) > 1:
        raise InputError(f"--{name} is given as {found[0]!r} and as {found[-1]!r}; give it once")
    if not found[0]:
        raise InputError(f"--{name} is empty; give it a value, or leave it out")
    return found[0]


def _unknown_flag(name: str, texts: Collection[str], usage: str) -> str:
    """Says which flag is meant, or which fields of the config if the script of the usage takes them."""
    key = name.replace("-", "_")
    fields = flatten(load_config("base:cifar10_lt").to_dict()) if "--config." in usage else {}
    meant = [f"--config.{field}=VALUE" for field in fields if f".{field}".endswith(f".{key}")]
    near = [f"--{flag}" for flag in difflib.get_close_matches(key, texts, 1)]
    best = meant or near or [f"--{flag}" for flag in texts]
    return f"unknown flag --{name}; use {'one of ' if len(best) > 1 else ''}{', '.join(best)}"


def run_and_checkpoint(values: Mapping[str, str]) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Returns the folders that ``--workdir`` and ``--checkpoint`` name, None for one that is not given.

    The checkpoint may be the number of a step of the run. The run may be left out if the checkpoint is inside
    of it. What lies in a bucket is copied, see ``storage.buckets``.

    Raises:
      InputError: the run is a checkpoint, or it is missing and the checkpoint is not inside of one.
    """
    run, checkpoint = (
        buckets.fetched(values[name]) if values[name] else None for name in ("workdir", "checkpoint")
    )
    place = (run or checkpoint or pathlib.Path()).absolute()
    around = run_around(place)
    if run is not None and place.parent.name in (CHECKPOINTS, BEST) and around == place.parents[1]:
        whole = run.parents[1] if len(run.parts) > 1 else around
        path = whole / place.parent.name / place.name
        raise InputError(f"--workdir={run} is a checkpoint; write --workdir={whole} --checkpoint={path}")
    if checkpoint is not None and run is None and around is None:
        raise InputError(f"{checkpoint} is not inside a run; name its run with --workdir")
    if checkpoint is not None and run is not None and not checkpoint.exists():
        inside = (folder for folder in (run / CHECKPOINTS / checkpoint, run / checkpoint) if folder.is_dir())
        checkpoint = next(inside, checkpoint)
    return run or (around if checkpoint else None), checkpoint and checkpoint.absolute()


def load_config(spec: str) -> ConfigDict:
    """Loads the config of a file: ``path.py``, ``path.py:argument``, or a shipped one: ``at:digits_lt``.

    Raises:
      InputError: there is no such file, its ``get_config`` refuses the argument, or it sets a field that no
        config has; the functions that sections name tell later what they take.
    """
    config = _loaded(_config_file(spec.partition(":")[0]), spec)
    known = flatten(_loaded(SHIPPED / "configs" / "base.py", "base:cifar10_lt").to_dict())
    of_functions = tuple(f"{section}." for section in NAMED)
    for key in flatten(config.to_dict()):
        if key not in known and not key.startswith(of_functions):
            raise InputError(f"{spec}: {_unknown_key(key, known)}")
    return config.lock()


def _loaded(path: pathlib.Path, spec: str) -> ConfigDict:
    """Returns what ``get_config`` of a config file makes of the argument of a spec."""
    name, _, argument = spec.partition(":")
    add_shipped()  # for ``from configs import base`` in the file
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"config file {name} is not Python; name a .py file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except ValueError as error:  # of the config itself, with words of its own
        raise InputError(f"{spec}: {error}") from error
    except Exception as error:  # of the user's code
        place = place_in(str(path), error)
        advice = "correct it" if place else "correct it, or give an argument that its get_config takes"
        raise InputError(f"config file {name} fails with {one_line(error)}{place}; {advice}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"get_config of {name} returns a {type(config).__name__}; return an ml_collections.ConfigDict"
        )
    return config


def _unknown_key(key: str, known: Collection[str]) -> str:
    """Says that a config has no such field, and which one is nearest."""
    inside = [field for field in known if field.startswith(f"{key}.")]
    if inside:
        example = f"{key}.name" if f"{key}.name" in inside else inside[0]
        return f"config.{key} is a section; set one of its fields, such as --config.{example}=VALUE"
    near = difflib.get_close_matches(key, known, 1)
    use = f"use {near[0]!r}" if near else "--help lists all; arguments of a function go into its own section"
    return f"unknown config key {key!r}; {use}"


def _config_file(name: str) -> pathlib.Path:
    """Finds a config file, by its path or by the name of a shipped one."""
    path, folder = pathlib.Path(name), SHIPPED / "configs"
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in folder.glob("*.py"))
    if name in shipped:
        return folder / f"{name}.py"
    stem = re.split(r"[\\/.]", name.removesuffix(".py"))[-1]
    there = {file.stem: str(file) for file in sorted(path.parent.glob("*.py"))}
    near = [there[found] for found in difflib.get_close_matches(stem, there, 1)]
    near = near or difflib.get_close_matches(stem.lower(), shipped, 1)
    known = shipped if path.parent == pathlib.Path() else there.values() or shipped
    raise InputError(f"no config file {name}; use {near[0] if near else 'one of ' + ', '.join(known)}")


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets fields of a config from ``--config.field=value``, see :func:`arguments.plain`.

    A section that names a function may get any argument of the function. If its name changes, fields of the
    config file that the new function does not take are dropped. Signatures need JAX, which is imported then.

    Raises:
      InputError: a field is unknown (the nearest known one is named), or a value has the wrong type.
    """
    known, read = flatten(config.to_dict()), []
    typed = {each.lstrip("-").partition("=")[0].removeprefix("config."): each for each in overrides}
    by_signature = _by_signature(known, typed)
    for key, override in typed.items():
        if key in by_signature:
            continue
        if key not in known:
            raise InputError(_unknown_key(key, known))
        read.append(plain(override, known[key]))
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, lock_config=True, flag_values=values, sys_argv=["", *read]
        )
        rest = values(["", *read])[1:]
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        raise InputError(str(error)) from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; write arguments as --name=value")
    if not by_signature:
        return values["config"].value

    from robal_jax import builder  # imports JAX

    return builder.with_arguments(values["config"].value, by_signature)


def _by_signature(known: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, str]:
    """Returns what is typed for those named sections whose function must be asked what it takes.

    They get a field that they lack, or they have others and their name changes.
    """
    found: dict[str, str] = {}
    texts = {key: override.partition("=")[2] for key, override in overrides.items() if "=" in override}
    for section in NAMED:
        typed = {key: text for key, text in texts.items() if key.startswith(f"{section}.")}
        renamed = [key for key in typed.keys() & known.keys() if key.endswith(".name")]
        renamed = [key.removesuffix("name") for key in renamed if known[key] != typed[key]]
        others = any(name.startswith(part) and name != f"{part}name" for part in renamed for name in known)
        if f"{section}.name" in known and (others or typed.keys() - known.keys()):
            found |= typed
    return found


def describe(config: ConfigDict, section: str = "") -> str:
    """Returns the fields of a config with their values, one per line, with the comments of configs/base.py.

    Args:
      config: the config.
      section: beginning of the fields' names; '' for all.
    """
    comments = _comments((SHIPPED / "configs" / "base.py").read_text())
    lines = []
    for name, value in flatten(config.to_dict()).items():
        if name.startswith(section):
            comment = f"  # {comments[name]}" if name in comments else ""
            lines.append(f"  config.{name} = {value!r}{comment}")
    lines.append("A section with a name also takes the other arguments of the function that it names.")
    return "\n".join(lines)


def _comments(source: str) -> dict[str, str]:
    """Returns the comments of a config file by the full name of the field that they are about.

    A comment is about the field that its line sets, the last one if there are several, or about the field
    below it, of a section its first one.
    """
    sections = {function: f"{name}." for name, function in re.findall(r"config\.(\w+) = (_\w+)\(", source)}
    sections["get_config"] = ""  # and no other function sets a field of every config
    found: dict[str, str] = {}
    above: list[str] = []
    prefix: str | None = None
    for line in map(str.strip, source.splitlines()):
        if line.startswith("#"):
            above.append(line.lstrip("# "))
            continue
        if function := re.match(r"def (\w+)", line):
            prefix = sections.get(function[1])
        if prefix is not None and (field := re.match(r"config\.([\w.]+) = ", line)):
            code, _, comment = line.partition("  # ")
            keys = re.findall(r'"(\w+)": ', code)
            for text, key in (comment, keys[-1:]), (" ".join(above), keys[:1]):
                if text:
                    found.setdefault(".".join([prefix + field[1], *key]), text.rstrip("."))
        above = []
    return found
