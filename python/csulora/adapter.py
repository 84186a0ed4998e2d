"""Adapters from and to disk, whatever their format."""

from __future__ import annotations

from pathlib import Path

from csulora.errors import InputError
from csulora.files import atomic_directory
from csulora.formats import Adapter, peft
from csulora.report import REPORT_FILE


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter and check every field and tensor of it.

    Args:
        path: a PEFT directory (``adapter_config.json`` and ``adapter_model.safetensors``).

    Raises:
        InputError: the adapter is missing or malformed.
        RefusedError: it is something that cannot be corrected as plain LoRA.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such adapter")
    if not path.is_dir():
        raise InputError(f"{path}: not a PEFT adapter directory")
    return peft.read(path)


def save_adapter(adapter: Adapter, path: str | Path, format: str = "peft") -> None:
    """Write an adapter, complete or not at all, together with its report and card if it was corrected.

    Args:
        adapter: what `load_adapter` or `correct` returned.
        path: directory to create; one that csulora wrote before is replaced.
        format: ``peft``.

    Raises:
        InputError: ``path`` cannot be created or is where the adapter came from, or the adapter does not fit the
            format.
    """
    if format != "peft":
        raise InputError(f"unknown adapter format {format!r}; it must be peft")
    if Path(path).resolve() == adapter.path.resolve():
        raise InputError(f"{path}: is the adapter that was read; choose another place for the new one")
    with atomic_directory(Path(path), marker=REPORT_FILE) as directory:
        peft.write(adapter, directory)
        for name, text in adapter.documents.items():
            (directory / name).write_text(text, encoding="utf-8")
