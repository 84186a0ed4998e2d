"""The contract of layers in pyproject.toml: kept, and broken by an import that goes up."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The editable installation's own finder would find the package in the checkout.
LINT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "scikit" not in type(finder).__module__.lower()
                 and "editable" not in type(finder).__module__.lower()]
sys.path.insert(0, ".")
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml", no_cache=True))
"""


@pytest.mark.parametrize(
    ("module", "line", "code"),
    [
        ("errors.py", "", 0),
        ("io/files.py", "from csulora.serving.gate import Gate", 1),
        ("correction/correct.py", "from csulora.serving import gate", 1),
        ("policy/policy.py", "from csulora.models import names", 1),
        ("views/tables.py", "import csulora.cli.app", 1),
    ],
)
def test_an_import_that_goes_up_breaks_the_contract(module: str, line: str, code: int, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "python" / "csulora", tmp_path / "csulora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "csulora" / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = subprocess.run([sys.executable, "-c", LINT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert f"{1 - code} kept, {code} broken" in done.stdout
