"""How a directory guard works, apart from the rules by which it decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Options of a directory guard.

    Attributes:
        settle: seconds for which an entry must not change before it is read, or be gone before it is withdrawn.
        patience: seconds for which an entry that cannot be read may be an upload that has come to a halt;
            after that it is refused as malformed.
        base_model: the model that GGUF files are for; without it they are refused.
        jobs: how many uploads are decided on at a time; each takes the memory of its adapter.
        withdraw: whether what was made of an upload is taken away when that leaves INCOMING; see `PRESENT_FILE`.
        quarantine: directory beside INCOMING that refused uploads are moved to; None: they stay where they are.
        health: file that says every second how the guard is; None: none.
        together: globs over names that the server adds up; see `csulora.serving.guard.together`.
    """

    settle: float = 2.0
    patience: float = 60.0
    base_model: str | Path | None = None
    jobs: int = 1
    withdraw: bool = False
    quarantine: Path | None = None
    health: Path | None = None
    together: tuple[str, ...] = ()


PRESENT_FILE = ".csulora-incoming"
"""What tells an INCOMING that is there from the mount point of a volume that is not."""
