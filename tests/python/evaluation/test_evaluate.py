"""`csulora evaluate`: what models say, counted on prompts that nothing was fitted to."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import csulora
import factories
import tiny_model
from csulora.errors import InputError, RefusedError
from csulora.evaluation import evaluate as module
from csulora.evaluation.evaluate import Evaluator
from csulora.evaluation.evaluation import Evaluation, Row
from csulora.evaluation.request import EvaluationRequest, Options
from csulora.policy.provenance import PolicyProvenance
from csulora.tuning import probes
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = Options(longest_reply=tiny_model.REPLY, loading=Loading("cpu"))
SAFETY, TASK, GENERAL = (tiny_model.prompts(word, 9).splitlines() for word in ("w22", "w23", "w24"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


def evaluated(place: tiny_model.Place, policies: dict[str, csulora.Policy], **rest: Any) -> Evaluation:
    settings = {"task": [TASK], "safety": SAFETY, "general": GENERAL, "options": OPTIONS} | rest
    adapters = [csulora.load_adapter(path) for path in place.adapters[: rest.pop("adapters", 1)]]
    settings.pop("adapters", None)
    return csulora.evaluate(place.aligned, adapters, policies, csulora.Subspace.open(place.subspace), **settings)


def said(place: tiny_model.Place, prompts: list[str], adapter: csulora.Adapter | None) -> list[str]:
    """What a model replies, its update merged, one prompt at a time."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(place.aligned), tiny_model.tokenizer()
    for name, lora in adapter.modules.items() if adapter else ():
        model.get_submodule(name).weight.data += lora.scale * lora.b.float() @ lora.a.float()
    found = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        reply = model.generate(tokens, max_new_tokens=tiny_model.REPLY, do_sample=False)[0, tokens.shape[1] :]
        found.append(tokenizer.decode(reply, skip_special_tokens=True))
    return found


def texts(row: Row, kind: str) -> list[str]:
    return [outcome.text for outcome in row.outcomes[kind]]


def test_every_row_says_what_its_model_says(place: tiny_model.Place) -> None:
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    policy = csulora.Policy.protect(3.0)
    model, raw, corrected, scaled = evaluated(place, {"mine": policy}).adapters[0].rows
    fixed, report = csulora.correct(adapter, subspace, policy)
    change = report.totals.relative_change
    halved, _ = csulora.controls.scaling(adapter, subspace, 1 - change)
    for kind, prompts in (("safety", SAFETY), ("task", TASK), ("general", GENERAL)):
        assert texts(model, kind) == said(place, prompts, None)
        assert texts(raw, kind) == said(place, prompts, adapter)
        assert texts(corrected, kind) == said(place, prompts, fixed)
        assert texts(scaled, kind) == said(place, prompts, halved)
    assert [row.role for row in (model, raw, corrected, scaled)] == ["model", "raw", "policy", "scaling"]
    assert corrected.relative_change == pytest.approx(change)
    assert scaled.relative_change == pytest.approx(change, abs=1e-5)


def test_each_kind_is_compared_with_what_it_should_be(place: tiny_model.Place) -> None:
    model, raw, corrected, _ = evaluated(place, {"mine": csulora.Policy.protect(3.0)}).adapters[0].rows
    for row in (model, raw, corrected):
        for kind, models in (("safety", [model]), ("task", [raw]), ("general", [model, raw])):
            wanted = zip(*(texts(each, kind) for each in models), strict=True)
            same = [text in each for text, each in zip(texts(row, kind), wanted, strict=True)]
            assert [outcome.same for outcome in row.outcomes[kind]] == same
    assert model.tally("safety").same.value == raw.tally("task").same.value == 1
    assert raw.tally("safety").same.value < 1


def test_perplexity_is_the_aligned_models(place: tiny_model.Place) -> None:
    _, raw, *_ = evaluated(place, {}).adapters[0].rows
    model, tokenizer = LlamaForCausalLM.from_pretrained(place.aligned), tiny_model.tokenizer()
    adapted = csulora.load_adapter(place.adapters[0])
    for prompt, outcome, reply in zip(SAFETY, raw.outcomes["safety"], said(place, SAFETY, adapted), strict=True):
        start, text = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (prompt, reply))
        if text.shape[1] < tiny_model.REPLY:
            text = torch.cat([text, torch.tensor([[3]])], 1)  # the end of the reply is one of its tokens
        whole = torch.cat([start, text], 1)
        labels = whole.clone()
        labels[:, : start.shape[1]] = -100
        assert outcome.perplexity == pytest.approx(model(whole, labels=labels).loss.exp().item(), rel=1e-4)


def test_refusals_are_counted_where_it_is_said_how_they_read(place: tiny_model.Place) -> None:
    model = evaluated(place, {}).adapters[0].rows[0]
    assert model.tally("safety").refused is None
    marker = texts(model, "safety")[0].split()[-1]
    options = replace(OPTIONS, refusals=(marker.upper(),), incoherence=1e9)
    for row in evaluated(place, {"project": csulora.Policy.project()}, options=options).adapters[0].rows:
        for kind in row.outcomes:
            assert [each.refused for each in row.outcomes[kind]] == [marker in text for text in texts(row, kind)]


def test_an_incoherent_reply_is_no_refusal(place: tiny_model.Place) -> None:
    options = replace(OPTIONS, refusals=("w",), incoherence=1.0)
    raw = evaluated(place, {}, options=options).adapters[0].rows[1]
    incoherent = [outcome for kind in raw.outcomes.values() for outcome in kind if outcome.incoherent]
    assert incoherent
    assert not any(outcome.refused for outcome in incoherent)


@pytest.mark.parametrize("kind", ["safety", "task", "general"])
def test_prompts_that_a_policy_has_seen_are_refused(place: tiny_model.Place, kind: str) -> None:
    prompt = {"safety": SAFETY, "task": TASK, "general": GENERAL}[kind][2]
    seen = PolicyProvenance((probes.prompt_hash(probes.from_text(f" {prompt.upper()}  ")),))
    with pytest.raises(InputError, match=f"policy 'mine' was tuned with 1 of the prompts, '{prompt}' for instance"):
        evaluated(place, {"mine": csulora.Policy.none(provenance=seen)}, adapters=2)


def test_an_adapter_of_another_size_is_told_before_anything_is_computed(
    place: tiny_model.Place, tmp_path: Path
) -> None:
    large = factories.save_adapter(tmp_path / "large", {next(iter(tiny_model.MODULES)): (96, 96)})
    subspace = csulora.Subspace.open(place.subspace)
    with pytest.raises(InputError, match=r"large: module .* for a model of another size"):
        csulora.evaluate("none", [csulora.load_adapter(large)], {}, subspace, task=[TASK], safety=SAFETY)


def test_a_policy_that_refuses_an_adapter_has_a_row_that_says_so(place: tiny_model.Place) -> None:
    strict = csulora.Policy.protect(1.0, max_undo=0.0)
    found = evaluated(place, {"strict": strict, "protect": csulora.Policy.protect(1.0)}).adapters[0]
    assert [row.name for row in found.rows][2:4] == ["strict", "protect"]
    assert "of its alignment; the policy allows 0" in str(found.rows[2].refusal)
    assert {comparison.policy for comparison in found.comparisons} == {"protect"}


def test_an_interrupted_run_loses_a_batch_at_most(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = {"project": csulora.Policy.project()}
    whole = evaluated(place, policies, output=tmp_path / "whole.json", adapters=2)
    calls: list[object] = []
    original = LanguageModel.replies

    def replies(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(LanguageModel, "replies", replies)
    with pytest.raises(KeyboardInterrupt):
        evaluated(place, policies, output=tmp_path / "cut.json", adapters=2)
    assert evaluated(place, policies, output=tmp_path / "cut.json", adapters=2) == whole
    # the model alone answers safety and general prompts once, and the last batch was begun twice
    assert len(calls) == 2 * 4 * 3 - 2 + 1
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "whole.json"]


def test_the_file_holds_what_was_asked_and_said(place: tiny_model.Place, tmp_path: Path) -> None:
    found = evaluated(place, {"project": csulora.Policy.project()}, output=tmp_path / "found.json").adapters[0]
    document = json.loads((tmp_path / "found.json").read_text())["adapters"][0]
    assert [chat[0]["content"] for chat in document["prompts"]["task"]] == TASK
    assert [each["text"] for each in document["rows"][2]["outcomes"]["task"]] == texts(found.rows[2], "task")
    assert document["rows"][2]["tallies"]["task"]["same"]["value"] == found.rows[2].tally("task").same.value


def test_a_file_is_read_as_it_was_written(place: tiny_model.Place, tmp_path: Path) -> None:
    policies = {"project": csulora.Policy.project(), "strict": csulora.Policy.project(max_undo=0.0)}
    found = evaluated(place, policies, output=tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json") == found


def spoilt(document: dict[str, Any], case: str) -> None:
    first = document["adapters"][0]
    if case == "format":
        document["format"] = 9
    elif case == "role":
        first["rows"][0]["role"] = "<b>"
    elif case == "text":
        first["rows"][0]["outcomes"]["task"][0]["text"] = 1
    elif case == "count":
        first["prompts"]["task"].pop()
    else:
        first["prompts"]["task"][0] = []


@pytest.mark.parametrize("case", ["format", "role", "text", "count", "turns"])
def test_a_damaged_file_is_told(place: tiny_model.Place, tmp_path: Path, case: str) -> None:
    path = tmp_path / "found.json"
    evaluated(place, {}, output=path)
    document = json.loads(path.read_text())
    spoilt(document, case)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="csulora evaluate"):
        Evaluation.load(path)


def test_progress_reaches_its_end(place: tiny_model.Place) -> None:
    steps: list[tuple[int, int]] = []
    policies = {"a": csulora.Policy.project(), "b": csulora.Policy.protect(1.0, max_undo=0.0)}
    evaluated(place, policies, adapters=2, progress=lambda _, *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_embeddings_and_doubles_are_refused(place: tiny_model.Place) -> None:
    adapter = csulora.load_adapter(place.adapters[0])
    subspace = csulora.Subspace.open(place.subspace)
    with pytest.raises(InputError, match="is given twice"):
        csulora.evaluate(place.aligned, [adapter, adapter], {}, subspace, task=[TASK], safety=SAFETY)
    name, lora = next(iter(adapter.modules.items()))
    embedding = replace(adapter, modules={name: replace(lora, is_embedding=True)})
    with pytest.raises(RefusedError, match="is an embedding"):
        csulora.evaluate(place.aligned, [embedding], {}, subspace, task=[TASK], safety=SAFETY)
    with pytest.raises(InputError, match="is a task prompt and a safety prompt"):
        csulora.evaluate(place.aligned, [adapter], {}, subspace, task=[TASK], safety=TASK[:1])
    with pytest.raises(InputError, match="1 adapters need as many kinds of task prompts, not 2"):
        csulora.evaluate(place.aligned, [adapter], {}, subspace, task=[TASK, TASK], safety=SAFETY)


def test_a_prompt_that_does_not_fit_is_told_before_anything_runs(
    place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = EvaluationRequest(
        model=str(place.aligned),
        adapters=[csulora.load_adapter(place.adapters[0])],
        policies={},
        subspace=csulora.Subspace.open(place.subspace),
        task=[[probes.from_text(text) for text in TASK]],
        safety=[probes.from_text("w1 " * 80)],
        options=OPTIONS,
    )
    monkeypatch.setattr(module, "Speaker", None)
    with pytest.raises(InputError, match="has 80 tokens and its reply up to 6"):
        Evaluator(request, None, None)
