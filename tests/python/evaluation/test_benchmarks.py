"""A task of lm-eval's own kind that lies on disk, with the model alone and with adapters."""

import json
import sys
from pathlib import Path

import pytest

import csulora
import tiny_model
from csulora.errors import InputError
from csulora.evaluation.benchmarks import Benchmarks
from csulora.evaluation.evaluation import Evaluation
from csulora.evaluation.request import Options
from csulora.tuning.loading import Loading

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = """
task: echo
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{reply}}}}"
generation_kwargs: {{until: ["<eos>"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def evaluated(place: tiny_model.Place, tasks: tuple[str, ...]) -> Evaluation:
    return csulora.evaluate(
        place.aligned,
        [csulora.load_adapter(place.adapters[0])],
        {"project": csulora.Policy.project()},
        csulora.Subspace.open(place.subspace),
        task=[place.task],
        safety=place.safety,
        options=Options(longest_reply=tiny_model.REPLY, loading=Loading("cpu"), lm_eval=tasks),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_task_scores_every_row(tmp_path: Path) -> None:
    """The right replies are the raw adapter's, so that each row's score is its share of those."""
    pytest.importorskip("lm_eval")
    place = tiny_model.build(tmp_path)
    rows = evaluated(place, ()).adapters[0].rows
    prompts, replies = place.task.read_text().splitlines(), [each.text for each in rows[1].outcomes["task"]]
    lines = [json.dumps({"prompt": prompt, "reply": reply}) for prompt, reply in zip(prompts, replies, strict=True)]
    (tmp_path / "echo.jsonl").write_text("\n".join(lines))
    (tmp_path / "echo.yaml").write_text(FILE.format(data=tmp_path / "echo.jsonl"))
    found = evaluated(place, (str(tmp_path / "echo.yaml"),)).adapters[0].rows
    for row in found:
        right = [outcome.text == reply for outcome, reply in zip(row.outcomes["task"], replies, strict=True)]
        assert row.scores["echo"]["exact_match,none"] == pytest.approx(sum(right) / 16)
    assert found[1].scores["echo"]["exact_match,none"] == 1
    assert found[0].scores["echo"]["exact_match,none"] < 1


def test_what_is_no_task_is_told(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "empty.yaml").write_text("dataset_path: json\n")
    for task, message in ((tmp_path / "empty.yaml", "has no line such as"), (tmp_path / "none.yaml", "not a readable")):
        with pytest.raises(InputError, match=message):
            Benchmarks([str(task)])


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'csulora\[evaluation\]'"):
        Benchmarks(["arc_challenge"])
