"""Every example of the README runs; what it trains on has fewer test images."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BASH = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_commands(tmp_path):
    """All commands after the two that install, in order, in a folder like the repository's root."""
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    method = next(code for code in PYTHON if "def inverse_frequency" in code)
    (tmp_path / "my_method.py").write_text(method)
    assert len(BASH) > 4
    for command in BASH[2:]:
        assert ".venv/bin/python experiments/" in command
        few = re.sub(r"((train|reproduce)\.py) ", r"\1 --config.data.test_per_class=10 ", command)
        done = subprocess.run(
            ["bash", "-euc", few.replace(".venv/bin/python", sys.executable)],
            cwd=tmp_path,
            env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/short/evaluation/report.md").is_file()
    assert (tmp_path / "runs/short_at/evaluation-tau_norm/report.md").is_file()


def test_the_first_two_blocks_set_themselves_up():
    for block in BASH[:2]:
        assert block.startswith("python3 -m venv ")
        assert "pip install" in block
    assert "experiments/compare.py" in BASH[0]
    assert "pytest" in BASH[1]
