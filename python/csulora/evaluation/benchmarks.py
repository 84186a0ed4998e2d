"""Tasks of lm-eval (EleutherAI's harness), on the model as it stands."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.tuning.language_model import BATCH, LanguageModel

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value, by lm-eval's own names."""

_TASK = re.compile(r"^task:\s*([\w.-]+)\s*$", re.MULTILINE)
_SIZE = "sample_len"  # among the metrics, and none


class Benchmarks:
    """Some tasks, known to be there."""

    def __init__(self, tasks: Sequence[str]) -> None:
        """Find the tasks.

        Args:
            tasks: names of lm-eval's tasks and groups, or paths of tasks' own YAML files.

        Raises:
            InputError: lm-eval is not installed, or has no such task.
        """
        try:
            self._harness = import_module("lm_eval")
            manager = import_module("lm_eval.tasks").TaskManager
        except ImportError as error:
            raise InputError("lm-eval is not installed; pip install 'csulora[evaluation]'") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
        self.names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
        folders = [str(file.resolve().parent) for file in files]
        # Its own tasks are thousands, and take long to find.
        self._manager = manager(include_path=folders or None, include_defaults=len(files) < len(tasks))
        for name in self.names:
            if name not in self._manager.all_tasks:
                raise InputError(f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists them")

    def scores(self, language_model: LanguageModel) -> Scores:
        """Return what the model, as it now stands, reaches in each task.

        Chats are written in the model's template, if it has one.

        Raises:
            InputError: a task cannot be run, since its data set is not there, for instance.
        """
        tokenizer = language_model.tokenizer
        try:
            wrapped = import_module("lm_eval.models.huggingface").HFLM(
                pretrained=language_model.model, tokenizer=tokenizer, batch_size=BATCH
            )
            found = self._harness.simple_evaluate(
                model=wrapped,
                tasks=self.names,
                task_manager=self._manager,
                apply_chat_template=tokenizer.chat_template is not None,
                log_samples=False,
            )
        except Exception as error:  # tasks raise what they like
            raise InputError(f"lm-eval does not run {', '.join(self.names)}: {error}") from error
        return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _name(file: Path) -> str:
    try:
        found = _TASK.search(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable task of lm-eval: {error}") from error
    if found is None:
        raise InputError(f"{file}: not a task of lm-eval; it has no line such as `task: name`")
    return found[1]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        metric: float(value)
        for metric, value in metrics.items()
        if isinstance(value, Real) and metric != _SIZE and math.isfinite(value)
    }
