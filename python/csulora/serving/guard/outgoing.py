"""What lies in OUTGOING: corrected adapters with their records, and refusals."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csulora.adapters.disk import save_with_hashes, weights_file_of
from csulora.adapters.lora import Adapter
from csulora.errors import InputError, printable
from csulora.io.files import is_gguf_name, parse_json, read_regular, sha256_of_file, to_json, workplace, write_text
from csulora.serving.guard.uploads import RECORD_FILE, REFUSED, is_presentable
from csulora.serving.provenance import Seal, seals_beside

_LARGEST_RECORD = 1 << 20


@dataclass(frozen=True)
class Standing:
    """What OUTGOING holds for a name.

    Attributes:
        verdict: as in the decision log.
        record: what it was made of, the decision's id and its figures, or the reason.
    """

    verdict: str
    record: Mapping[str, Any]

    def holds(self, made_of: Mapping[str, str]) -> bool:
        """Whether it was made of that, and all of it was recorded."""
        return made_of.items() <= self.record.items()


class Outgoing:
    """The directory that servers read."""

    def __init__(self, directory: Path, base_model: str | Path | None) -> None:
        """Nothing is read or written yet; ``base_model`` is what GGUF files are for."""
        self.directory, self._base_model = directory, base_model

    def standing(self, name: str) -> Standing | None:
        """Return what there is for an upload; of both kinds of result the corrected one counts."""
        if is_presentable(name) and (self.directory / name).exists() and (record := _read(self._record(name))):
            return Standing("corrected", record)
        if record := _read(self.refusal(name)):
            return Standing(str(record.get("verdict", "failed")), record)
        return None

    def publish(
        self, name: str, corrected: Adapter, record: Mapping[str, Any], seal: Seal | None = None
    ) -> dict[str, str]:
        """Let a corrected adapter take the place of what was there; return path -> sha256 of its files."""
        path = self.directory / name
        if is_gguf_name(name):
            _, hashes = save_with_hashes(corrected, path, "gguf", base_model=self._base_model, seal=seal)
            write_text(self._record(name), to_json(record))
            if seal is None:
                for file in seals_beside(path):  # of what was there before
                    file.unlink(missing_ok=True)
        else:
            if not (path / weights_file_of(corrected.format)).exists():
                self.take_away(name)  # a directory in another format is not replaced file by file
            documents = dict(corrected.documents) | {RECORD_FILE: to_json(record)}
            _, hashes = save_with_hashes(replace(corrected, documents=documents), path, seal=seal)
            del hashes[str(path / RECORD_FILE)]
        self.refusal(name).unlink(missing_ok=True)
        return hashes

    def refuse(self, name: str, record: Mapping[str, Any]) -> None:
        """Let a reason take the place of what was there."""
        self.take_away(name)
        write_text(self.refusal(name), to_json(record))

    def note(self, name: str, reason: Mapping[str, Any]) -> None:
        """Say beside what is there why an upload was not decided on."""
        write_text(self.refusal(name), to_json(reason))

    def take_away(self, name: str) -> None:
        """Take away the corrected adapter of a name, if csulora wrote one."""
        if not is_presentable(name) or not self._record(name).is_file():
            return
        if is_gguf_name(name):
            for file in (self.directory / name, *seals_beside(self.directory / name)):
                file.unlink(missing_ok=True)
            self._record(name).unlink()
        else:
            with workplace(self.directory / name) as place:
                (self.directory / name).rename(place / "old")

    def clear(self, name: str) -> None:
        """Take away whatever there is for a name."""
        self.take_away(name)
        self.refusal(name).unlink(missing_ok=True)

    def keep_only(self, name: str, verdict: str) -> None:
        """Where both kinds of result are there, take away the one that does not stand."""
        if verdict == "corrected":
            self.refusal(name).unlink(missing_ok=True)
        else:
            self.take_away(name)

    def names(self) -> list[str]:
        """Return the names that there is a result of csulora's for; of refusals with unprintable names, the file's."""
        corrected = (path.name for path in self.directory.iterdir() if self._is_written(path))
        refused = (path.name.removesuffix(REFUSED) for path in self.directory.glob(f"[!.]*{REFUSED}"))
        return sorted({*corrected, *refused})

    def without(self, uploads: Iterable[str]) -> list[str]:
        """Return those of `names` that no upload has; refusals of what was moved to quarantine stay."""
        present = {self.refusal(name).name.removesuffix(REFUSED) for name in uploads}
        gone = [name for name in self.names() if name not in present]
        return [name for name in gone if not ((found := self.standing(name)) and found.record.get("quarantined"))]

    def outcome(self, name: str, decision: Mapping[str, Any]) -> dict[str, str] | None:
        """Return the outputs of a decision on an upload, path -> sha256, if it took effect here, else None."""
        found = self.standing(name)
        if decision.get("verdict") == "withdrawn":
            return {} if found is None else None
        if found is None or found.verdict != decision.get("verdict") or found.record.get("decision") != decision["id"]:
            return None
        path = self.directory / name
        if found.verdict != "corrected":
            return {}
        files = [path] if path.is_file() else sorted(path.iterdir())
        return {str(file): sha256_of_file(file) for file in files if file.name != RECORD_FILE}

    def refusal(self, name: str) -> Path:
        """Where the refusal of an upload lies."""
        if not is_presentable(name):
            shown = printable(name).encode()[:80].decode(errors="ignore")  # bytes count, and escapes are long
            name = f"{shown}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
        return self.directory / f"{name}{REFUSED}"

    def _is_written(self, path: Path) -> bool:
        return not path.name.startswith(".") and self._record(path.name).is_file()

    def _record(self, name: str) -> Path:
        """Where the record of a corrected adapter lies: in its directory, or beside its file."""
        if is_gguf_name(name):
            return self.directory / f"{name}.{RECORD_FILE}"
        return self.directory / name / RECORD_FILE


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return parse_json(read_regular(file, _LARGEST_RECORD), file)
    except (InputError, OSError):
        return None
