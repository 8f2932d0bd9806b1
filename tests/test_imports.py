"""Who may import whom: the direction of the library, and what only one module may know."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "robal_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}
"""Every file of the library but its face, by name: 'losses', 'attacks.threat', 'attacks.__init__'."""
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# A room, a file at the top or a folder, imports from rooms above its own line only.
LAYERS = (
    {"errors", "keys"},
    {"checks"},
    {"models", "arguments", "intervals", "own_functions"},
    {"class_terms", "class_statistics", "linear_bounds"},
    {"losses"},
    {
        "attacks",
        "classifiers",
        "data",
        "metrics",
        "optimizers",
        "devices",
        "averages",
        "budgets",
        "perturbations",
        "regularisers",
    },
    {"certificates", "distances", "objectives", "storage"},
    {"attack_modes"},
    {"reporting", "pytorch"},
    {"builder"},
    {"training", "evaluation", "cli"},  # none imports another
    {"exchange", "compiling"},
    {"zoo", "console"},
)
# The one module, or two, that know a library.
OWNERS = {
    "orbax": {"storage.checkpoints"},
    "matplotlib": {"reporting.figures", "reporting.curves"},
    "tensorboardX": {"storage.progress"},
    "grain": {"data.image_folder"},
    "tensorflow": set(),
    "tensorflow_datasets": {"data.cifar"},
    "torch": {"pytorch.files"},
    "safetensors": {"pytorch.files"},
}
ROOMS = {name.partition(".")[0] for name in MODULES}
# Whose functions receive a whole config; only the builder looks into it, and "exchange" at two names in it.
READS_CONFIG = {name for name in MODULES if name.startswith("builder.")} | {"exchange"}


def tree(path):
    return ast.parse(path.read_text())


@functools.cache
def imported(path):
    """Full names of all that a file imports, wherever in it: ``robal_jax.losses``, ``numpy``."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path):
    """Rooms of the library that a file imports."""
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "robal_jax" and len(p) > 1 and p[1] in ROOMS}


def test_every_room_has_a_layer():
    assert {name for layer in LAYERS for name in layer} == ROOMS


def test_folders_are_looked_at():
    """The tests below would pass in vain if they saw the top folder only."""
    assert len(MODULES) > 50
    assert "attacks.threat" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_direction_of_imports(name):
    room, below = name.partition(".")[0], set()
    for layer in LAYERS:
        if room in layer:
            break
        below |= layer
    assert rooms_imported(MODULES[name]) <= below | {room}


@pytest.mark.parametrize("library", OWNERS)
def test_who_knows_a_library(library):
    knowing = {
        name for name, path in MODULES.items() if library in {full.split(".")[0] for full in imported(path)}
    }
    assert knowing <= OWNERS[library]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_import_nothing_but_each_other(path):
    assert {name.split(".")[0] for name in imported(path)} <= {"ml_collections", "configs"}


def config_reads(name):
    """Attributes and items of anything called ``config`` that a file reads."""
    nodes = [
        node for node in ast.walk(tree(MODULES[name])) if isinstance(node, ast.Attribute | ast.Subscript)
    ]
    return [node for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "config"]


@pytest.mark.parametrize("name", sorted(set(MODULES) - READS_CONFIG))
def test_only_the_builder_reads_config_fields(name):
    methods = {"lock", "to_dict", "to_json"}  # of any config
    assert {getattr(node, "attr", "[]") for node in config_reads(name)} <= methods


def test_the_builder_reads_config_fields():
    """The test above would pass in vain if configs had another name."""
    assert sum(len(config_reads(name)) for name in READS_CONFIG) > 20


@pytest.mark.slow
def test_tensorflow_and_torch_are_not_imported():
    code = (
        "import sys; sys.modules['torch'] = None;"  # tensorboardX tries it
        "import robal_jax.training, robal_jax.evaluation, robal_jax.reporting.report, robal_jax.data.sources;"
        "print(sorted({'tensorflow', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_command_line_starts_without_jax():
    code = "import sys, robal_jax.cli; print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def docstrings(path):
    """Lines of all docstrings of a file, and of strings that describe a name below it."""
    strings = [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}


def lines_of_code(path):
    """Numbers of the lines that are neither empty, nor a comment, nor part of a docstring."""
    lines = enumerate(path.read_text().splitlines(), 1)
    code = {number for number, line in lines if line.strip() and not line.strip().startswith("#")}
    return code - docstrings(path)


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short(name):
    code = lines_of_code(MODULES[name])
    functions = (node for node in ast.walk(tree(MODULES[name])) if isinstance(node, ast.FunctionDef))
    sizes = {f.name: len(code & set(range(f.lineno, f.end_lineno + 1))) for f in functions}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


@pytest.mark.slow
def test_files_are_short():
    sizes = {name: len(lines_of_code(path)) for name, path in MODULES.items()}
    assert {name: size for name, size in sizes.items() if size > 350} == {}


@pytest.mark.slow
def test_runs_are_compared_without_matplotlib():
    code = (
        "import sys;"
        "from robal_jax.reporting import comparison, names, results, terminal;"
        "print('matplotlib' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
