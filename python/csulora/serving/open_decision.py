"""What is done to one adapter between the moment it is opened and the moment its decision is recorded."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from csulora.adapters.disk import load_adapter
from csulora.adapters.expert_encoding import Layout
from csulora.adapters.lora import Adapter
from csulora.adapters.peft import directory as peft
from csulora.adapters.weights_files import LARGEST_WEIGHTS, hashes_as_written
from csulora.correction.correct import correct
from csulora.correction.report import Report
from csulora.errors import InputError
from csulora.io.files import sha256_of_file, workplace
from csulora.policy.policy import Policy
from csulora.serving.decisions import Form
from csulora.serving.limiter import limited
from csulora.serving.signatures import Verifier
from csulora.subspace.subspace import Subspace

ADAPTER_FILES = re.compile(r"adapter_config\.json|adapters\.safetensors|adapter_model\S*\.safetensors(\.index\.json)?")
_MOST_HASHED = 100  # files of a refused adapter that a line of the log names


class OpenDecision:
    """What a block under `Gate.decision` does with one adapter.

    Attributes:
        path, name: of the adapter, see `csulora.serving.decisions.Decision`; ``id``: of the decision.
        started: by `time.perf_counter`.
        adapter_sha256: the adapter's content; None until it was read.
        inputs: name -> sha256 of the files that were read; None until they were.
        report: what the correction did; None until there is one.
        is_made: whether an adapter was corrected or recalled.
        is_recalled: whether it was recalled.
        outputs: path -> sha256 of what the host was given.
        form: what else decided on the outputs' bytes.
        error: why the adapter is not let through, where the block says so without raising.
        is_repeated: whether the same outcome of the same adapter was recorded before and is not recorded again.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None,
        subspace: Subspace,
        policy: Policy,
        is_logged: bool,
        verifier: Verifier | None = None,
    ) -> None:
        """Nothing is known of the adapter yet; files are hashed only if somebody will read of it."""
        self._subspace, self._policy, self._is_logged, self._verifier = subspace, policy, is_logged, verifier
        self.path, self.name = Path(path), Path(path).name if name is None else name
        self.id, self.started = secrets.token_hex(8), time.perf_counter()
        self.adapter_sha256: str | None = None
        self.inputs: Mapping[str, str] | None = None
        self.report: Report | None = None
        self.is_made = self.is_recalled = self.is_repeated = False
        self.outputs: Mapping[str, str] = {}
        self.form: Form | None = None
        self.base_model: str | None = None
        self.error: Exception | None = None

    def read(self, path: Path, base_model: str | Path | None = None) -> Adapter:
        """Return what `csulora.load_adapter` reads. Threads wait for one another, see `csulora.serving.limiter`."""
        self.base_model = None if base_model is None else str(Path(base_model).absolute())
        return self._read(path, lambda: load_adapter(path, base_model))

    def read_directory(self, path: Path) -> Adapter:
        """Return the adapter in a PEFT directory, for hosts that take no other format."""
        return self._read(path, lambda: peft.read(path))

    def _read(self, path: Path, reader: Callable[[], Adapter]) -> Adapter:
        """Read an adapter, and if signatures are required, verify it before and compare it afterwards."""
        with limited():
            return self.take(self._verifier.read(path, reader) if self._verifier else reader())

    def take(self, adapter: Adapter) -> Adapter:
        """Return an adapter that is in memory; the decision is about this one."""
        self.adapter_sha256, self.inputs = adapter.sha256, adapter.files
        return adapter

    def correct(self, adapter: Adapter, layout: Layout | None = None) -> tuple[Adapter, Report]:
        """Return what `csulora.correct` makes of an adapter. Threads wait for one another."""
        with limited():
            corrected, self.report = correct(self.take(adapter), self._subspace, self._policy, layout)
        self.form = Form(corrected.format, layout)
        self.is_made = True
        return corrected, self.report

    def recall(self, outputs: Mapping[str, str], form: Form = Form()) -> None:  # noqa: B008 - frozen
        """Let through again what this gate made of the adapter earlier, and the host has kept."""
        self.is_made = self.is_recalled = True
        self.outputs, self.form = outputs, form

    def delivered(self, outputs: Mapping[str, str], form: Form | None = None) -> None:
        """Say what the host is given: path -> sha256, and in which form, if in another than `correct` left it."""
        self.outputs, self.form = outputs, form or self.form

    def refuse(self, error: Exception) -> None:
        """Say why the adapter is not let through; the block then delivers the reason, and the decision is recorded."""
        self.error = error

    @contextmanager
    def private_directory(self, adapter: Adapter) -> Iterator[Path]:
        """Yield a PEFT directory of the adapter that only this process knows and that is gone after the block."""
        with workplace(Path(gettempdir(), "csulora")) as place:
            tensors = peft.write(adapter, place)
            if self._is_logged:
                form = replace(self.form or Form(), format="peft")
                self.delivered(hashes_as_written(place / peft.WEIGHTS_FILE, tensors), form)
            yield place


def hashes_of(path: Path) -> dict[str, str]:
    """Return name -> sha256 of an adapter's files as they are now, of those that can be read; for one that was refused.

    What is beyond the largest size that is read is left out.
    """
    found: dict[str, str] = {}
    left = LARGEST_WEIGHTS
    with suppress(OSError):
        files = sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else [path]
        for file in files:
            is_its_own = file == path or ADAPTER_FILES.fullmatch(file.name)
            if not is_its_own or file.is_symlink() or not file.is_file() or len(found) == _MOST_HASHED:
                continue
            with suppress(InputError):
                found[file.name] = sha256_of_file(file, left)
                left -= file.stat().st_size
    return found
