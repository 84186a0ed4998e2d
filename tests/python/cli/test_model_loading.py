"""What the commands that run a model share."""

from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from csulora.cli.model_loading import written_general
from csulora.tuning import self_written
from csulora.tuning.loading import Loading


def test_bars_of_other_libraries_stay_away_while_the_model_writes_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown: list[bool] = []
    monkeypatch.setattr(
        self_written, "written", lambda file, *_: shown.append(not are_progress_bars_disabled()) or file
    )
    enable_progress_bars()
    assert written_general(tmp_path / "g", "model", Loading("cpu"), 0, quiet=False) == str(tmp_path / "g")
    assert shown == [False]
