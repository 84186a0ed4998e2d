"""What the examples in docstrings may use."""

from pathlib import Path
from typing import Any

import csulora

FIXTURE = Path(__file__).parents[2] / "bench" / "efficacy" / "fixture"


def example_names(directory: Path) -> dict[str, Any]:
    """``csulora``, and paths of a small model pair, of an adapter for it and of its subspace file, which is made."""
    subspace = directory / "model.subspace.safetensors"
    base, aligned, adapter = (str(FIXTURE / name) for name in ("base", "aligned", "adapter"))
    csulora.extract(base, aligned, rank=8).save(subspace)
    return {"csulora": csulora, "base": base, "aligned": aligned, "adapter": adapter, "subspace": str(subspace)}
