"""`csulora guard` on a disk that is full while the file that FULL_DISK names is there: the real command, at fault.

What is published, and what is logged, cannot be written then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csulora.cli.app import main
from csulora.io import files


def failing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that fails while the disk is full."""

    def replacement(*arguments: Any, **options: Any) -> Any:
        if Path(os.environ["FULL_DISK"]).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    return replacement


if __name__ == "__main__":
    files._flush_to_disk = failing(files._flush_to_disk)
    main()
