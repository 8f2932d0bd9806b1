"""Every example of the README runs, with fewer test images and, where it attacks, with fewer attacks."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BASH = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FEWER = {
    'folder="runs/linear"': 'folder="runs/linear", version="apgd_ce", audit=0',
    '"standard"': '"apgd_ce"',
}


def execute(code):
    for name, fewer in FEWER.items():
        code = code.replace(name, fewer)
    variables = {}
    exec(compile(code, "README.md", "exec"), variables)
    return variables


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for code in PYTHON if "load_run" not in code])
def test_python_examples(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = execute(code)
    if "evaluate_model" in code:
        assert found["results"].summary["conditions"]["worst"]["accuracy"]["value"] > 0.5
        assert (tmp_path / "runs/linear/report.html").is_file()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_commands(tmp_path, monkeypatch):
    """All commands after the two that install, in order, in a folder like the repository's root."""
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    method = next(code for code in PYTHON if "def inverse_frequency" in code)
    (tmp_path / "my_method.py").write_text(method)
    (tmp_path / "my_statistics.py").write_text(next(code for code in PYTHON if "def errors" in code))
    assert len(BASH) > 4
    for command in BASH[2:]:
        assert ".venv/bin/python experiments/" in command
        few = re.sub(r"((train|reproduce)\.py) ", r"\1 --config.data.test_per_class=3 ", command)
        done = subprocess.run(
            ["bash", "-euc", few.replace(".venv/bin/python", sys.executable)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/short/evaluation/report.md").is_file()
    assert (tmp_path / "runs/short_at/evaluation-tau_norm/report.md").is_file()
    # The run that the first block of commands would have trained.
    (tmp_path / "runs/digits_lt").mkdir()
    (tmp_path / "runs/digits_lt/at").symlink_to(tmp_path / "runs/short_at")
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in PYTHON if "load_run" in code)
    found = execute(code)["found"]
    assert found.robust["apgd_ce"].sum() <= found.robust["clean"].sum()


def test_the_front_door_is_short():
    for name in ("evaluate_model", "load_run", "autoattack"):
        (code,) = (code for code in PYTHON if f"robal_jax.{name}(" in code)
        assert len(code.splitlines()) <= 10


def test_the_first_two_blocks_set_themselves_up():
    for block in BASH[:2]:
        assert block.startswith("python3 -m venv ")
        assert "pip install" in block
    assert "experiments/compare.py" in BASH[0]
    assert "pytest" in BASH[1]


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", README):
        assert target in anchors or (ROOT / target).exists(), target
