"""Files of the Hugging Face Hub, and how they are named: ``org/name@revision:sub/folder``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from csulora.errors import InputError
from csulora.io.files import is_gguf_name

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*(/[\w.-]+)?)"
    r"(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?"
    r"(:(?P<inside>[\w-][\w. -]*(/[\w-][\w. -]*)*))?"
)


class HubId(NamedTuple):
    """The parts of a hub id: ``org/name``, and ``revision`` and ``sub/folder`` where they are named."""

    repo: str
    revision: str | None
    inside: str


def hub_id(source: str | Path) -> HubId | None:
    """Return the parts of a hub id; None for a `Path`, and for text that is none.

    >>> hub_id("org/name@main:sub/folder")
    HubId(repo='org/name', revision='main', inside='sub/folder')
    """
    found = _ID.fullmatch(source) if isinstance(source, str) else None
    return HubId(found["repo"], found["revision"], found["inside"] or "") if found else None


def local_path(source: str | Path, files: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Return where a source lies: a local path as it is, or what a hub id names, downloaded.

    Args:
        source: a path, or as text a hub id: ``org/name``, with ``@revision`` and then ``:sub/folder`` or
            ``:sub/file.gguf`` where they are meant. A `Path` is never a hub id.
        files: globs over the names to fetch, within the folder; a GGUF file that is named is fetched alone.
        ignored: globs over names that are not fetched.

    Raises:
        InputError: neither is there, or the hub cannot be reached.
    """
    local = Path(source)
    if local.exists():
        return local
    found = hub_id(source)
    if found is None:
        raise InputError(
            f"{source}: no such file or directory; a hub id is written org/name, org/name@revision or "
            "org/name@revision:sub/folder"
        )
    repo, revision, inside = found
    if is_gguf_name(inside):
        patterns, ignored = [inside], []
    else:
        patterns, ignored = ([str(Path(inside, glob)) for glob in globs] for globs in (files, ignored))
    place = download(repo, patterns, revision=revision, ignore_patterns=ignored) / inside
    if not place.exists():
        raise InputError(f"{source}: the repository has no such file or folder: {inside}; check its file list")
    return place


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
