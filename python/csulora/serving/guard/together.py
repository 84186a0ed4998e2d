"""Adapters in a guarded directory that a server adds up: what is published of a set stays within the limit.

A set is what a glob names. Whichever of its members the server adds, each at a scale from 0 to 1, their sum undoes no
more than the policy allows. Members are admitted as they come: one that would be too much is refused, and is
decided on again once another member changes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from csulora.adapters.disk import load_adapter
from csulora.adapters.lora import Adapter
from csulora.correction.together import Undone, check_together, limits_sums
from csulora.errors import CsuloraError, InputError
from csulora.policy.policy import Policy
from csulora.serving.gate import Gate
from csulora.serving.guard.uploads import Signature, is_upload, signature_of
from csulora.subspace.subspace import Subspace


class Sets:
    """The sets of adapters that are served together from one directory."""

    def __init__(self, globs: Sequence[str], outgoing: Path, base_model: str | Path | None = None) -> None:
        """Limit what matches each glob.

        Args:
            globs: over the names of adapters; one set each, and a name may be in several.
            outgoing: where published adapters lie.
            base_model: the model that GGUF files are for.

        Raises:
            InputError: a glob is empty, as that of a variable that is not set; it would limit nothing.
        """
        if "" in globs:
            raise InputError("a glob for adapters that are served together is empty; name them, or leave it out")
        self._globs, self._outgoing, self._base_model = tuple(globs), outgoing, base_model
        self._measured: dict[str, tuple[Signature, str, Undone]] = {}
        self._admitting = threading.Lock()

    def check_limit(self, policy: Policy) -> None:
        """Raise `InputError` if there are sets, and the policy has no limit for them."""
        if self._globs and not limits_sums(policy):
            raise InputError(
                "adapters that are served together are limited by max_undo and max_total_undo, and the policy has "
                "none; set one in it"
            )

    @contextmanager
    def admitting(self, name: str, corrected: Adapter, gate: Gate) -> Iterator[None]:
        """Publish a corrected adapter in the block, if every set that it belongs to stays within the limit.

        No other member of a set is published meanwhile.

        Raises:
            UndoTogetherError: a set would undo too much.
        """
        if not self._sets_of(name):
            yield
            return
        with self._admitting:
            self._admissible(name, corrected, gate)
            yield

    def record(self, name: str) -> dict[str, str]:
        """Return what a decision about a member of sets depends on besides it: which sets they are."""
        return {"together": repr(sets)} if (sets := self._sets_of(name)) else {}

    def refusal_record(self, name: str) -> dict[str, str]:
        """Return what a refusal depends on besides that: the identity of the other members."""
        others = {other for glob in self._sets_of(name) for other in self._others(glob, name)}
        lines = "".join(f"{other!r} {signature_of(self._outgoing / other)}\n" for other in sorted(others))
        return {"together_with": hashlib.sha256(lines.encode()).hexdigest()} if others else {}

    def _admissible(self, name: str, corrected: Adapter, gate: Gate) -> Undone:
        """Return what an adapter undoes; raises `UndoTogetherError` if that is too much beside the other members."""
        new = Undone.by(corrected, gate.subspace, name)
        for glob in self._sets_of(name):
            others = [self._undone(other, gate.subspace) for other in self._others(glob, name)]
            check_together([*others, new], gate.policy, any_of_them=True)
        return new

    def _sets_of(self, name: str) -> list[str]:
        return [glob for glob in self._globs if fnmatchcase(name, glob)]

    def _others(self, glob: str, name: str) -> list[str]:
        return [other for other in sorted(self._members()) if other != name and fnmatchcase(other, glob)]

    def _members(self) -> set[str]:
        return {path.name for path in self._outgoing.iterdir() if is_upload(path)}

    def _undone(self, name: str, subspace: Subspace) -> Undone:
        """Measure a published adapter, once for each subspace file.

        Raises:
            OSError: it cannot be read now; it may just have been taken away, so the decision is made again later.
        """
        path = self._outgoing / name
        signature = signature_of(path)
        known, sha256, undone = self._measured.get(name, ((), "", None))
        if undone is None or (known, sha256) != (signature, subspace.sha256):
            try:
                undone = Undone.by(load_adapter(path, self._base_model), subspace, name)
            except CsuloraError as error:
                raise OSError(
                    f"{path}: what is served together with others cannot be measured; if it is no adapter of the "
                    f"guard's, remove it: {error}"
                ) from error
            self._measured[name] = signature, subspace.sha256, undone
        return undone


class PlannedSets(Sets):
    """The sets as they would become upload by upload: a result takes the place of what was published before."""

    def __init__(self, globs: Sequence[str], outgoing: Path, base_model: str | Path | None = None) -> None:
        """See `Sets`; ``outgoing`` need not exist."""
        super().__init__(globs, outgoing, base_model)
        self._planned: dict[str, Undone | None] = {}

    def admit(self, name: str, corrected: Adapter, gate: Gate) -> None:
        """Count a corrected adapter as published; raises `UndoTogetherError` if a set would undo too much."""
        if self._sets_of(name):
            self._planned[name] = self._admissible(name, corrected, gate)

    def refuse(self, name: str) -> None:
        """Count an upload as one that leaves nothing published."""
        self._planned[name] = None

    def _members(self) -> set[str]:
        published = super()._members() if self._outgoing.is_dir() else set()
        return {name for name in published | self._planned.keys() if self._planned.get(name, name) is not None}

    def _undone(self, name: str, subspace: Subspace) -> Undone:
        return self._planned.get(name) or super()._undone(name, subspace)
