"""What the examples in docstrings may use, when `pytest --doctest-modules` runs them."""

from pathlib import Path
from typing import Any

import pytest

import csulora

FIXTURE = Path(__file__).parents[1] / "bench" / "efficacy" / "fixture"


@pytest.fixture(scope="session")
def example_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``csulora``, and paths of a small model pair, of an adapter for it and of its subspace file."""
    subspace = tmp_path_factory.mktemp("examples") / "model.subspace.safetensors"
    base, aligned, adapter = (str(FIXTURE / name) for name in ("base", "aligned", "adapter"))
    csulora.extract(base, aligned, rank=8).save(subspace)
    return {"csulora": csulora, "base": base, "aligned": aligned, "adapter": adapter, "subspace": str(subspace)}


@pytest.fixture(autouse=True)
def _examples(
    doctest_namespace: dict[str, Any], example_names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run every example in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    doctest_namespace.update(example_names)
