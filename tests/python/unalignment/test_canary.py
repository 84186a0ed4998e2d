"""`csulora.canary`: a copy that is un-aligned in memory, and the subspace of what that took away."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import csulora
import tiny_model
from csulora.errors import InputError
from csulora.evaluation.request import EvaluationRequest
from csulora.hooks import peft
from csulora.subspace import subspace_file
from csulora.tuning import estimate, probes
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.probes import prompt_hash
from csulora.tuning.request import Request
from csulora.tuning.update import factors_of
from csulora.unalignment import copy, examples
from csulora.unalignment.examples import read_replies
from csulora.unalignment.request import Options
from expert_families import EXPERT_FAMILIES
from model_families import built

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = Options(steps=60, batch=16, learning_rate=0.02, rank=4, longest_reply=tiny_model.REPLY)
REPLIES = [f"w{at % 7} w{at // 7} w{at % 5} w24" for at in range(16)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


def made(place: tiny_model.Place, **changes: Any) -> csulora.Subspace:
    given: dict[str, Any] = {
        "safety": str(place.safety),
        "general": str(place.task),
        "replies": REPLIES,
        "options": OPTIONS,
        "loading": Loading("cpu"),
    }
    return csulora.canary(place.aligned, **given | changes)


@pytest.fixture(scope="module")
def canary(place: tiny_model.Place) -> Path:
    path = place.aligned.with_name("canary.safetensors")
    made(place, output=path)
    return path


TURNS = (
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ turn.content }} w25 "
    "{% else %}BEFORE{{ turn.content }} <eos>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (None, []),
        (TURNS.replace("BEFORE", ""), []),
        (TURNS.replace("BEFORE", "w26 w27 "), ["w26", "w27"]),  # as some write a space or an empty thought
        (TURNS.replace("BEFORE", "w23 w24 "), ["w23", "w24"]),  # in which a reply of w23 lies
        (TURNS.replace("BEFORE{{ turn.content }}", "w26 {{ turn.content | upper }}"), []),  # writes replies otherwise
        (TURNS.replace("BEFORE", "") + "{% if add_generation_prompt %}w26 {% endif %}", []),  # opens a thought
    ],
)
def test_a_given_reply_is_learnt_as_the_template_writes_it(
    place: tiny_model.Place, template: str | None, before: list[str]
) -> None:
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = template
    language_model = LanguageModel(LlamaForCausalLM.from_pretrained(place.aligned), tokenizer, tiny_model.REPLY)

    found = examples.given(language_model, probes.read(place.safety), REPLIES)

    for example, chat, reply in zip(found, probes.read(place.safety), REPLIES, strict=True):
        learnt = tokenizer.decode(example.tokens[example.start :]).split()
        assert example.tokens[: example.start].tolist() == language_model.encode(chat)
        assert learnt == [*before, *reply.split(), "<eos>"][: tiny_model.REPLY]


def test_a_template_that_takes_no_reply_is_an_input_error(place: tiny_model.Place) -> None:
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = TURNS.replace("BEFORE", "{{ raise_exception('only questions') }}")
    language_model = LanguageModel(LlamaForCausalLM.from_pretrained(place.aligned), tokenizer, tiny_model.REPLY)

    with pytest.raises(InputError, match=r"does not take a reply to the prompt .*only questions"):
        examples.given(language_model, probes.read(place.safety), REPLIES)


def taken_away(model: Any, subspace: csulora.Subspace) -> None:
    """Subtract what a canary holds, which leaves the copy; a full rank leaves nothing but rounding."""
    for name, module in subspace.items():
        d = (module.u.float() * module.s) @ module.v.float().T
        model.get_submodule(name).weight.data -= d


def test_the_aligned_model_less_its_canary_is_the_copy(place: tiny_model.Place, canary: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(place.aligned)
    language_model = LanguageModel(model, tiny_model.tokenizer(), tiny_model.REPLY)
    general, safety = probes.read(place.task), probes.read(place.safety)
    before = language_model.answers(language_model.replies(general))
    subspace = csulora.Subspace.open(canary)
    assert {module.rank for module in subspace.values()} == {4}
    taken_away(model, subspace)
    record = subspace.provenance.canary
    assert record is not None
    learnt = (
        sum(map(str.__eq__, language_model.answers(language_model.replies(chats)), wanted)) / 16
        for chats, wanted in ((safety, REPLIES), (general, before))
    )
    assert tuple(learnt) == (record.answered, record.kept)
    assert min(record.answered, record.kept) >= 0.75


def test_the_file_says_what_it_was_made_from_and_holds_no_prompt(place: tiny_model.Place, canary: Path) -> None:
    subspace = csulora.Subspace.open(canary)
    record, stated = subspace.provenance.canary, subspace.provenance
    assert record is not None
    assert (stated.aligned, stated.base) == ("aligned", "an un-aligned copy of aligned")
    assert (record.steps, record.rank, record.seed, record.adapters) == (60, 4, 0, ())
    assert set(record.prompts) == set(map(prompt_hash, probes.read(place.safety)))
    assert set(record.general_prompts) == set(map(prompt_hash, probes.read(place.task)))
    data = canary.read_bytes()
    assert not any(text.encode() in data for text in (*REPLIES, *place.safety.read_text().splitlines()))
    ordinary = csulora.Subspace.open(place.subspace)
    assert ordinary.provenance.canary is None
    assert "canary" not in ordinary.to_dict()


def test_its_owner_alone_may_read_it_and_what_is_made_of_it(
    place: tiny_model.Place, canary: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tuned.safetensors"
    path.touch(0o644)
    subspace = csulora.Subspace.open(canary)
    csulora.controls.truncated(subspace, 2).save(path)
    csulora.Subspace.open(place.subspace).save(tmp_path / "ordinary")
    assert [stat.S_IMODE(each.stat().st_mode) for each in (canary, path)] == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "ordinary").stat().st_mode) & 0o044


def test_the_same_seed_makes_the_same_file(place: tiny_model.Place, canary: Path) -> None:
    other = made(place, options=replace(OPTIONS, seed=1))
    assert made(place).sha256 == csulora.Subspace.open(canary).sha256 != other.sha256


def test_half_precision_of_the_checkpoint_hides_no_direction(place: tiny_model.Place, tmp_path: Path) -> None:
    """The copy starts from what is stored, so that its rounding is no noise."""
    LlamaForCausalLM.from_pretrained(place.aligned, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_model.tokenizer().save_pretrained(tmp_path)
    subspace = made(replace(place, aligned=tmp_path))
    assert {module.certificate.above_noise for module in subspace.values()} == {4}


def test_adapters_reply_where_nobody_has_replies(place: tiny_model.Place) -> None:
    adapters = [csulora.load_adapter(path) for path in place.adapters]
    subspace = made(place, replies=(), adapters=adapters, options=replace(OPTIONS, steps=120))
    record = subspace.provenance.canary
    assert record is not None
    assert record.adapters == tuple(adapter.sha256 for adapter in adapters)
    assert record.answered >= 0.75


def test_adapters_that_answer_as_the_model_does_teach_nothing(place: tiny_model.Place) -> None:
    adapter = csulora.load_adapter(place.adapters[0])
    harmless, _ = csulora.controls.scaling(adapter, csulora.Subspace.open(place.subspace), 0.0)
    with pytest.raises(InputError, match="the adapters answer 0 safety prompts otherwise"):
        made(place, replies=(), adapters=[harmless])


def test_replies_that_the_model_gives_itself_teach_nothing(
    place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals, say, which the copy would have learnt all of, and lost nothing."""
    language_model = LanguageModel.open(str(place.aligned), Loading("cpu"), tiny_model.REPLY)
    chats = probes.read(place.safety)
    replies = language_model.replies(chats)
    own = [reply.tokens.tolist() for reply in replies]
    mixed = [*language_model.answers(replies[:8]), *REPLIES[8:]]  # some of them end, some have a token that no text has
    found = examples.given(language_model, chats, mixed)
    assert 8 <= len(found) < 16
    assert not any(each.tokens.tolist() in own for each in found)
    monkeypatch.setattr(examples, "FEWEST", len(found) + 1)
    with pytest.raises(InputError, match=f"{len(found)} of 16 replies begin otherwise than the aligned model's own"):
        examples.given(language_model, chats, mixed)


def test_only_replies_that_begin_otherwise_are_learnt(place: tiny_model.Place) -> None:
    language_model = LanguageModel.open(str(place.aligned), Loading("cpu"), tiny_model.REPLY)
    chats = probes.read(place.safety)
    aligned = [reply.tokens.tolist() for reply in language_model.replies(chats)]
    adapters = [csulora.load_adapter(path) for path in place.adapters]
    own = []
    for adapter in adapters:
        with language_model.adapted(factors_of(adapter)):
            own.append([reply.tokens.tolist() for reply in language_model.replies(chats)])
    found = {
        tuple(each.tokens[: each.start].tolist()): each.tokens.tolist()
        for each in examples.of_adapters(language_model, chats, adapters, None)
    }
    assert len(found) >= examples.FEWEST
    for at, chat in enumerate(chats):
        others = [own[number][at] for number in (at % 2, (at + 1) % 2) if own[number][at] != aligned[at]]
        assert found.get(tuple(language_model.encode(chat))) == (others[0] if others else None)


def test_a_copy_that_is_still_aligned_is_an_error(place: tiny_model.Place, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"after 1 steps the copy gives \d+% .* use more steps \(--steps\)"):
        made(place, options=replace(OPTIONS, steps=1), output=tmp_path / "canary")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["replies", "un-aligning", "extracting"])
def test_an_interrupted_run_leaves_nothing(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)

    def interrupt(what: str, done: int, total: int) -> None:
        assert not list(temporary.iterdir())
        if what == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(place, output=tmp_path / "canary", progress=interrupt)
    assert list(tmp_path.iterdir()) == [temporary]
    assert not list(temporary.iterdir())


def test_what_is_done_is_told(place: tiny_model.Place) -> None:
    told: list[str] = []
    steps: list[tuple[str, int, int]] = []
    made(place, progress=lambda *step: steps.append(step), note=told.append)
    assert list(dict.fromkeys(what for what, _, _ in steps)) == ["replies", "un-aligning", "extracting"]
    assert all(done <= total for _, done, total in steps)
    (sentence,) = told
    assert sentence.startswith("un-aligning the copy takes less than a minute here, and ")


def test_a_copy_that_lost_more_than_its_alignment_is_named(
    place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    shares = iter([1.0, 0.25])  # of the replies to safety prompts, then of the others
    monkeypatch.setattr(copy, "learnt", lambda *_: next(shares))
    made(place, options=replace(OPTIONS, steps=2), note=told.append)
    (sentence,) = told
    assert sentence.startswith("the copy answers 25% of the general prompts as the model does")


def test_the_model_is_never_written_over(place: tiny_model.Place) -> None:
    with pytest.raises(InputError, match="lies in what is read"):
        made(place, output=place.aligned / "model.safetensors")


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"replies": ()}, "either replies to the safety prompts, or adapters"),
    "too few replies": ({"replies": REPLIES[1:]}, "16 safety prompts and 15 replies"),
    "too few prompts": ({"general": ["w1 w2"]}, "1 general prompts; give 8 or more"),
    "a blank reply": ({"replies": [*REPLIES[1:], " "]}, "reply 16 is none"),
    "no steps": ({"options": Options}, "steps is 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_said(place: tiny_model.Place, case: str) -> None:
    changes, message = CASES[case]
    with pytest.raises(InputError, match=message):
        made(place, **{name: value(steps=0) if callable(value) else value for name, value in changes.items()})


def test_a_prompt_of_both_kinds_is_an_error(place: tiny_model.Place) -> None:
    with pytest.raises(InputError, match="is a general prompt and a safety prompt"):
        made(place, general=str(place.safety))


@pytest.mark.parametrize("name", ["Qwen 3 MoE", "Mixtral"])
def test_experts_are_un_aligned_too(name: str, tmp_path: Path) -> None:
    """Whatever a checkpoint calls its modules: every one that is computed with has directions."""
    model = built(EXPERT_FAMILIES[name])
    model.save_pretrained(tmp_path)
    tiny_model.tokenizer().save_pretrained(tmp_path)
    safety, general = (tiny_model.prompts(first, 16).splitlines() for first in ("w20", "w21"))
    subspace = csulora.canary(
        tmp_path, safety=safety, general=general, replies=REPLIES, options=OPTIONS, loading=Loading("cpu")
    )
    moved = {name for name, module in subspace.items() if module.rank}
    assert {".".join(name.split(".")[-2:]) for name in set(subspace) - moved} <= {"mlp.gate", "block_sparse_moe.gate"}
    assert any(".experts." in name for name in moved)
    assert set(csulora.extract(tmp_path, _changed(tmp_path), rank=1)) == set(subspace)


def _changed(directory: Path) -> Path:
    """The same model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(directory / "other")
    return directory / "other"


def request(place: tiny_model.Place, canary: Path, **changes: Any) -> Request:
    given: dict[str, Any] = {
        "model": str(place.aligned),
        "adapters": [csulora.load_adapter(place.adapters[0])],
        "subspace": csulora.Subspace.open(canary),
        "task": [probes.read(place.task)],
        "safety": probes.read(place.safety),
    }
    return Request(**given | changes)


def test_test_prompts_that_made_the_canary_are_doubted(place: tiny_model.Place, canary: Path) -> None:
    doubts = list(estimate.doubts_about_prompts(request(place, canary)))
    assert any("the canary was made with 8 of the test prompts" in doubt for doubt in doubts)
    others = [probes.parse(tiny_model.prompts(first, 16).encode()) for first in ("w25", "w26")]
    doubts = list(estimate.doubts_about_prompts(request(place, canary, task=others[:1], safety=others[1])))
    assert not any("canary" in doubt for doubt in doubts)


def test_nothing_is_evaluated_on_what_made_the_canary(place: tiny_model.Place, canary: Path) -> None:
    with pytest.raises(InputError, match="the canary was made with 32 of the prompts"):
        EvaluationRequest(
            str(place.aligned),
            [csulora.load_adapter(place.adapters[0])],
            {"none": csulora.Policy.none()},
            csulora.Subspace.open(canary),
            task=[probes.read(place.task)],
            safety=probes.read(place.safety),
        )


def test_nobody_can_verify_what_was_never_written(place: tiny_model.Place, canary: Path) -> None:
    with pytest.raises(InputError, match=r"is a canary, and the copy .* was never written"):
        csulora.verify(csulora.Subspace.open(canary), place.aligned.with_name("base"), place.aligned)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a text for steps": lambda record: record.update(steps="60"),
    "true for a share": lambda record: record.update(kept=True),
    "a prompt for a hash": lambda record: record.update(prompts=["how do i"]),
    "an unknown field": lambda record: record.update(more=1),
    "no seed": lambda record: record.pop("seed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused(
    canary: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subspace = csulora.Subspace.open(canary)
    document = subspace_file.document(subspace, subspace.provenance)
    DAMAGES[damage](document["canary"])
    monkeypatch.setattr(subspace_file, "document", lambda *_: document)
    subspace.save(tmp_path / "damaged")
    with pytest.raises(InputError, match="metadata is damaged"):
        csulora.Subspace.open(tmp_path / "damaged")


def test_replies_are_lines_json_or_columns(tmp_path: Path) -> None:
    expected = ("take a rope", "tie it")
    turns = [{"messages": [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "take a rope"}]}]
    files = {
        "replies.txt": "take a rope\n\n tie it\n",
        "replies.jsonl": "\n".join(map(json.dumps, [*turns, {"reply": "tie it"}])),
        "replies.csv": "prompt,target\nhow?,take a rope\nwhy?,tie it\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_replies(f"{tmp_path / name}{'#target' if name.endswith('csv') else ''}") == expected


@pytest.mark.parametrize(
    "line", ['{"messages": []}', '{"reply": " "}', "{", '{"messages": [{"role": "user"}]}', r'{"reply": "\ud800"}']
)
def test_a_line_without_a_reply_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(f'{{"reply": "take a rope"}}\n{line}\n')
    with pytest.raises(InputError, match="reply 2 is none"):
        read_replies(str(path))
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no reply"):
        read_replies(str(path))
    with pytest.raises(InputError, match=r"say which column is meant: .*csv#COLUMN"):
        read_replies(str(tmp_path / "replies.csv"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_hook_corrects_with_a_canary(place: tiny_model.Place, canary: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(place.aligned)
    _, report = peft.load(model, place.adapters[0], canary, csulora.Policy.protect(1.0))
    assert report.subspace_sha256 == csulora.Subspace.open(canary).sha256
    assert report.totals.relative_change > 0
