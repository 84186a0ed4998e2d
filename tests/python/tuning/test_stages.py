from pathlib import Path

import pytest

from csulora.errors import InputError
from csulora.tuning.stages import Stages


def test_leaves_no_trace_of_a_run_that_was_killed_as_it_finished_a_stage(tmp_path: Path) -> None:
    output = tmp_path / "policy.toml"
    stages = Stages(output, {})
    assert stages.finish("fit", lambda: [1.0]) == [1.0]
    stages.path.with_name(f".{stages.path.name}.01234567.csulora-tmp").mkdir()
    stages = Stages(output, {})
    assert stages.finish("fit", lambda: [2.0]) == [1.0]
    stages.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["", '"format": 1, '])
def test_stages_of_another_format_are_not_continued(tmp_path: Path, version: str) -> None:
    (tmp_path / "policy.toml.partial").write_text(f'{{{version}"identity": {{}}, "results": {{}}}}')
    with pytest.raises(InputError, match="stages of another format than 2; remove it and run the command again"):
        Stages(tmp_path / "policy.toml", {})
