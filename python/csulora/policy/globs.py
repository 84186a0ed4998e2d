"""Names that a glob selects, in policies and on the command line."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(module: str, pattern: str) -> bool:
    """Whether a glob matches the module's whole name or a trailing part of it that starts at a dot.

    >>> matches("model.layers.0.mlp.up_proj", "mlp.*"), matches("model.layers.0.mlp.up_proj", "p.up_proj")
    (True, False)
    """
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")
