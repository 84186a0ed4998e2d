"""What the examples in docstrings may use, when `pytest --doctest-modules` runs them."""

from pathlib import Path
from typing import Any

import pytest

from example_names import example_names


@pytest.fixture(scope="session")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that every example may use."""
    return example_names(tmp_path_factory.mktemp("examples"))


@pytest.fixture(autouse=True)
def _examples(
    doctest_namespace: dict[str, Any], names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run every example in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    doctest_namespace.update(names)
