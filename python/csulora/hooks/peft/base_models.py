"""Which base model is loaded where only an adapter is named: what the program allowed, never what an upload says.

PEFT's auto classes, transformers' auto classes and its ``pipeline`` take a directory that holds an adapter alone, and
load the model that its ``base_model_name_or_path`` names. Under a guard that name, and its revision, must be on the
guard's list.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import peft
from peft import auto as peft_auto
from transformers import pipelines
from transformers.integrations import peft as transformers_peft
from transformers.models.auto import auto_factory

from csulora.adapters.peft.config import read_config
from csulora.adapters.weights_files import CONFIG_FILE, LARGEST_CONFIG
from csulora.errors import InputError, UncoveredRouteError
from csulora.hooks.peft.loading import loads_corrected, local_directory
from csulora.io.files import parse_json, read_regular

MODEL_CONFIG_FILE = "config.json"
_NO_FILE = "\0"  # a name that no file has


class BaseModels:
    """The base models that adapters may name, as the program would: ``org/name``, ``org/name@revision``, a path."""

    def __init__(self, allowed: Sequence[str | Path]) -> None:
        """Allow these; nothing if there are none.

        Raises:
            InputError: it is one name and no list, or something in it is no name.
        """
        if isinstance(allowed, (str, Path)) or not all(isinstance(name, (str, Path)) for name in allowed):
            raise InputError(f"base_models is {allowed!r}; it must be a list of names, such as ['org/name']")
        self._allowed = frozenset(map(_without_slash, allowed))
        self._answers = TemporaryDirectory(prefix="csulora-peft-")

    def close(self) -> None:
        """Remove what the hosts were given to read."""
        self._answers.cleanup()

    def check(self, file: Path) -> dict[str, Any]:
        """Return what an adapter's configuration says, read once.

        Raises:
            RefusedError: its base model is not allowed, or it is no plain LoRA.
            InputError: it is malformed.
        """
        config = read_config(parse_json(read_regular(file, LARGEST_CONFIG), file), file)
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        if (
            not name
            or (f"{_without_slash(name)}@{revision}" if revision else _without_slash(name)) not in self._allowed
        ):
            raise UncoveredRouteError(
                f"{file}: names the base model {name!r}{f', revision {revision!r}' if revision else ''}; under a guard "
                "the program chooses it: load the model by its own name, or allow it with guard(..., base_models=[...])"
            )
        return config

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """Everything to put in the hosts' place: owner, attribute, replacement."""
        for owner in (auto_factory, pipelines, transformers_peft):
            yield owner, "find_adapter_config_file", self._finding_allowed(owner.find_adapter_config_file)
            # The hosts would look again whether there is a model beside the adapter, and there may be one by then.
            yield owner, "CONFIG_NAME", _NO_FILE
        yield peft_auto, "PeftConfig", _Configurations(self)
        # A tokenizer beside an adapter would decide on the size of the base model's embedding.
        yield peft_auto, "TOKENIZER_CONFIG_NAME", _NO_FILE
        yield peft_auto, "check_file_exists_on_hf_hub", lambda **options: False

    def _own_model(self, directory: str) -> str:
        """Return a directory that holds a model beside an adapter, if that is allowed: the hosts load this model."""
        if _without_slash(directory) not in self._allowed:
            raise UncoveredRouteError(
                f"{directory}: holds a model beside the adapter; under a guard the program chooses the base model: "
                "load it by its own name, or allow this one with guard(..., base_models=[...])"
            )
        return directory

    def _without_revision(self, file: Path) -> str:
        """Return the base model of an adapter that names no revision: transformers would load another than it names."""
        config = self.check(file)
        name, revision = str(config["base_model_name_or_path"]), config.get("revision")
        if revision:
            raise UncoveredRouteError(
                f"{file}: names revision {revision!r} of {name!r}, which transformers ignores; "
                f"load {name!r} with revision={revision!r} first, then the adapter with load_adapter"
            )
        return name

    def _finding_allowed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def find_adapter_config_file(model_id: Any, *args: Any, **options: Any) -> str | None:
            found: str | None = original(model_id, *args, **options)
            if found is None or loads_corrected.get():
                return found
            if Path(model_id, MODEL_CONFIG_FILE).exists():
                base_model = self._own_model(str(model_id))
            else:
                base_model = self._without_revision(Path(found))
            # The host opens what it is given, and reads this field alone.
            with NamedTemporaryFile("w", suffix=".json", dir=self._answers.name, delete=False) as answer:
                json.dump({"base_model_name_or_path": base_model}, answer)
            return answer.name

        return find_adapter_config_file


def _without_slash(name: str | Path) -> str:
    return str(name).rstrip("/") or "/"


class _Configurations:
    """Stands in for ``PeftConfig`` where PEFT's auto classes ask it which base model to load."""

    def __init__(self, base_models: BaseModels) -> None:
        self._base_models = base_models

    def from_pretrained(self, source: Any, **options: Any) -> peft.LoraConfig:
        directory = local_directory(source, {key: value for key, value in options.items() if value is not None})
        return peft.LoraConfig(**self._base_models.check(directory / CONFIG_FILE))
