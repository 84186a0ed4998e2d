"""Files of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from csulora.errors import InputError


def download(repo: str, files: Sequence[str], **options: Any) -> Path:
    """Return a local directory with some files of a repository, from the cache where they are there.

    Args:
        repo: its id.
        files: globs over the names to fetch.
        options: further arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        InputError: there is no such local directory or repository, or it cannot be reached.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files), **options))
    except Exception as error:  # the hub client raises a dozen unrelated types, those of its HTTP library among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repo}: neither a local directory nor to be had from the Hugging Face Hub ({reason}); "
            "check the path, the id and the network"
        ) from error
