"""Who may import whom: the direction of the library, and what only one module may know."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in sorted((ROOT / "robal_jax").glob("*.py")) if path.stem != "__init__"}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# A module imports from layers above its own line only. A new module needs a place here.
LAYERS = (
    {"errors", "convolutions"},
    {"losses", "models", "state", "logs", "hosts", "page", "figures"},
    {
        "attacks",
        "classifiers",
        "metrics",
        "data",
        "checkpoints",
        "reporting",
        "cli",
        "torch_import",
        "parallel",
    },
    {"folders"},
    {"objectives", "sources", "comparison", "paper", "autopgd", "fab", "square", "victim", "unfinished"},
    {"autoattack", "audit"},
    {"build"},
    {"train", "tables"},
    {"evaluate"},
)
# The one module, or two, that know a library.
OWNERS = {
    "orbax": {"checkpoints"},
    "matplotlib": {"figures"},
    "tensorboardX": {"logs"},
    "grain": {"folders"},
    "tensorflow": set(),
    "tensorflow_datasets": {"sources"},
    "torch": {"torch_import"},
    "safetensors": {"torch_import"},
    "ml_collections": {"build", "cli", "train", "evaluate"},
}


def tree(path):
    return ast.parse(path.read_text())


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


def own_imports(path):
    """Modules of the library that a file imports."""
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "robal_jax" and len(p) > 1 and p[1] in MODULES}


def test_every_module_has_a_layer():
    assert set(MODULES) - {name for layer in LAYERS for name in layer} == set()


@pytest.mark.parametrize("name", MODULES)
def test_direction_of_imports(name):
    below = set()
    for layer in LAYERS:
        if name in layer:
            break
        below |= layer
    assert own_imports(MODULES[name]) <= below


@pytest.mark.parametrize("library", OWNERS)
def test_who_knows_a_library(library):
    knowing = {
        name for name, path in MODULES.items() if library in {full.split(".")[0] for full in imported(path)}
    }
    assert knowing <= OWNERS[library]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_import_nothing_but_each_other(path):
    assert {name.split(".")[0] for name in imported(path)} <= {"ml_collections", "configs"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"build"}))
def test_only_build_reads_config_fields(name):
    allowed = {"lock", "items"} if name == "cli" else set()  # methods of any config
    read = {
        node.attr
        for node in ast.walk(tree(MODULES[name]))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    indexed = [
        node
        for node in ast.walk(tree(MODULES[name]))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "config"
    ]
    assert read <= allowed
    assert not indexed


def test_build_reads_config_fields():
    """The test above would pass in vain if configs had another name."""
    read = [
        node
        for node in ast.walk(tree(MODULES["build"]))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    ]
    assert len(read) > 20


def test_tensorflow_and_torch_are_not_imported():
    code = (
        "import sys; sys.modules['torch'] = None;"  # tensorboardX tries it
        "import robal_jax.train, robal_jax.evaluate, robal_jax.reporting, robal_jax.sources;"
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


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short(name):
    functions = [
        node
        for node in ast.walk(tree(MODULES[name]))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 80}
    assert not long


def test_files_are_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in MODULES.values()}
    largest = max(lines, key=lines.get)
    print(f"largest file: {largest}, {lines[largest]} lines")
    assert lines[largest] <= 700
