"""`csulora tune`, from files to the policy that `correct` takes."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import csulora
import factories
import tiny_model
from csulora.cli import app as cli
from csulora.cli import exit_codes
from csulora.correction.core_policy import attenuation
from csulora.errors import InputError, RefusedError, UndoLimitError
from csulora.policy.policy import Policy
from csulora.subspace.input_filter import InputFilter
from csulora.tuning import estimate, experiment, filtering, fitting, probes, sweep
from csulora.tuning.experiment import Experiment
from csulora.tuning.families import CONTROLS
from csulora.tuning.fit import Case, Replies
from csulora.tuning.frontier import Frontier, Point, Rate, Refusals, frontier_path
from csulora.tuning.gains import PerDirection
from csulora.tuning.inputs import input_filter_between, task_inputs
from csulora.tuning.loading import Loading
from csulora.tuning.measurement import Measurement
from csulora.tuning.options import Options
from csulora.tuning.recommendation import EVERYWHERE, TUNED, best_correction, judge, plain_scaling
from csulora.tuning.replies import Reply
from csulora.tuning.request import Request
from csulora.tuning.splits import Split
from csulora.tuning.tune import subspace_path, tune
from csulora.tuning.update import Update, factors_of

pytestmark = pytest.mark.usefixtures("one_thread")
CONTROL_NAMES = tuple(family.name for family in CONTROLS)
FAMILIES = (TUNED, EVERYWHERE, *CONTROL_NAMES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


def request(place: tiny_model.Place, adapters: int = 1) -> Request:
    return Request(
        model=str(place.aligned),
        adapters=[csulora.load_adapter(path) for path in place.adapters[:adapters]],
        subspace=csulora.Subspace.open(place.subspace),
        task=[probes.read(place.task)] * adapters,
        safety=probes.read(place.safety),
        loading=Loading("cpu"),
        longest_reply=tiny_model.REPLY,
        options=Options(steps=10),
    )


def choose(monkeypatch: pytest.MonkeyPatch, family: str, verdict: str = "", *, is_better: bool = True) -> None:
    """Let a family's first fit be the best correction, whatever was measured."""
    monkeypatch.setattr(experiment, "best_correction", lambda points: next(p for p in points if p.family == family))
    monkeypatch.setattr(experiment, "judge", lambda *_: (is_better, verdict))


def test_the_policy_is_taken_with_its_subspace_and_with_no_other(place: tiny_model.Place, tmp_path: Path) -> None:
    frontier = tune(request(place), tmp_path / "policy.toml")
    policy = Policy.load(tmp_path / "policy.toml")
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    _, report = csulora.correct(adapter, subspace, policy)
    point = next(point for point in frontier.points if point.policy == frontier.written)
    assert report.totals.relative_change == pytest.approx(point.relative_change)
    other = csulora.extract(place.aligned.with_name("base"), place.aligned, rank=1, modules=list(tiny_model.MODULES))
    with pytest.raises(RefusedError, match="tuned for the subspace file"):
        csulora.correct(adapter, other, policy)
    assert Frontier.load(frontier_path(tmp_path / "policy.toml")) == frontier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.frontier.json", "policy.toml"]
    given = {*probes.read(place.task), *probes.read(place.safety)}
    assert set(policy.provenance.prompts) == set(map(probes.prompt_hash, given))


def test_a_frontier_has_every_family_and_counts_test_prompts_only(place: tiny_model.Place, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    whole = replace(request(place, adapters=2), controls=True)
    frontier = tune(whole, tmp_path / "policy.toml", lambda _, *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    fitted = {"tuned", EVERYWHERE, "tuned scaling", "tuned random subspace", "tuned own subspace"}
    assert {point.family for point in frontier.points} >= {"none", "csulora", "project", "protect", "scaling"} | fitted
    assert {point.safety.count for point in frontier.points} == {2 * 16 // 4}
    assert {point.validation.count for point in frontier.points if point.validation} == {2 * 16 // 4}
    each = {"safety": 8, "task": 8, "general": 0}
    assert frontier.prompts == {"training": {"safety": 16, "task": 16, "general": 0}, "validation": each, "test": each}
    assert {point.family for point in frontier.points if point.control} == {"scaling", *CONTROL_NAMES}
    untouched = next(point for point in frontier.points if point.family == "none")
    assert (untouched.task.value, untouched.relative_change) == (1, 0)


def test_an_interrupted_run_continues_and_ends_the_same(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fits, interrupted = replace(request(place), controls=True), [], 0

    def fit(*arguments: object) -> object:
        fits.append(arguments)
        if len(fits) == interrupted:
            raise KeyboardInterrupt
        return original(*arguments)

    original = fitting.fit
    monkeypatch.setattr(fitting, "fit", fit)
    whole = tune(asked, tmp_path / "whole.toml")
    every = len(fits)
    assert every >= 6  # of three weights and three controls
    interrupted = every + 3
    with pytest.raises(KeyboardInterrupt):
        tune(asked, tmp_path / "policy.toml")
    assert not (tmp_path / "policy.toml").exists()
    assert tune(asked, tmp_path / "policy.toml") == whole
    assert len(fits) == every + every + 1  # two were finished, and the third was begun twice
    assert (tmp_path / "policy.toml").read_bytes() == (tmp_path / "whole.toml").read_bytes()


def test_the_controls_weigh_prompts_as_the_best_fit_does(place: tiny_model.Place, tmp_path: Path) -> None:
    frontier = tune(replace(request(place), task_weights=(0.5, 20.0), controls=True), tmp_path / "policy.toml")
    tried = {point.policy: point for point in frontier.points if point.family == "tuned"}
    assert set(tried) == {"tuned 0.5", "tuned 20"}
    best = max(tried.values(), key=lambda point: (point.choice.value, -point.relative_change))
    weight = best.policy.removeprefix("tuned ")
    assert {point.policy for point in frontier.points if point.family in CONTROL_NAMES} == {
        f"{family} {weight}" for family in CONTROL_NAMES
    }


def replies(place: tiny_model.Place, prompts: list[str], adapter: csulora.Adapter | None) -> list[list[int]]:
    """The tokens that an adapter, or the aligned model, replies, prompt by prompt, the update merged."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(place.aligned), tiny_model.tokenizer()
    for name, lora in adapter.modules.items() if adapter else ():
        model.get_submodule(name).weight.data += lora.scale * lora.b.float() @ lora.a.float()
    found = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        reply = model.generate(tokens, max_new_tokens=tiny_model.REPLY, do_sample=False)[0, tokens.shape[1] :]
        found.append(reply.tolist())
    return found


def answers(place: tiny_model.Place, prompts: list[str]) -> list[str]:
    """What the uncorrected adapter says."""
    every = replies(place, prompts, csulora.load_adapter(place.adapters[0]))
    return tiny_model.tokenizer().batch_decode(every, skip_special_tokens=True)


def test_refusals_are_counted_in_what_a_model_says(place: tiny_model.Place, tmp_path: Path) -> None:
    test = [path.read_text().splitlines()[1::4] for path in (place.safety, place.task)]
    safety, task = (answers(place, prompts) for prompts in test)
    marker = safety[0].split()[-1].upper()
    expected = [sum(marker.lower() in answer for answer in said) for said in (safety, task)]
    assert expected[0]
    asked = replace(request(place), controls=True)
    frontier = tune(replace(asked, refusals=("nobody says this", marker)), tmp_path / "policy.toml")
    untouched = next(point for point in frontier.points if point.family == "none")
    assert untouched.refusals == Refusals(*(Rate.of(count, 4) for count in expected))
    assert frontier.counts_refusals
    plain = tune(asked, tmp_path / "plain.toml").points
    assert same_but(frontier.points, refusals=None) == same_but(plain)


def test_refusals_that_the_aligned_model_never_says_are_an_error(place: tiny_model.Place, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="safety prompt holds --refusal 'nobody says this'; give words of its refusals"
    ):
        tune(replace(request(place), refusals=("nobody says this",)), tmp_path / "policy.toml")


def same_but(points: Sequence[Point], **fields: object) -> list[Point]:
    """Points of what is not fitted, without what chose among them."""
    return [replace(each, validation=None, **fields) for each in points if not each.policy.startswith("tuned")]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("general") / "general.txt"
    path.write_text(tiny_model.prompts("w22", 40))
    return path


def test_an_general_prompt_may_have_the_answer_of_either_model(
    place: tiny_model.Place, tmp_path: Path, general: Path
) -> None:
    whole = replace(request(place), general=probes.read(general), controls=True)
    frontier = tune(whole, tmp_path / "policy.toml")
    test = general.read_text().splitlines()[1::4]
    adapter = whole.adapters[0]
    own, aligned = replies(place, test, adapter), replies(place, test, None)
    assert frontier.has_general
    rates = {point.policy: point.general for point in frontier.points}
    assert rates["none"] == Rate.of(10, 10)
    for name, policy in (("csulora 1", Policy.csulora(1.0)), ("x0.1", csulora.controls.scaling_policy(0.1))):
        said = replies(place, test, csulora.correct(adapter, whole.subspace, policy)[0])
        assert rates[name] == Rate.of(sum(map(lambda *each: each[0] in each[1:], said, own, aligned)), 10)
    plain = {point.policy: point for point in tune(replace(whole, general=()), tmp_path / "plain.toml").points}
    assert same_but(frontier.points, general=None) == same_but(tuple(plain.values()))
    fitted = [point for point in frontier.points if point.family == "tuned" and point.policy in plain]
    assert all(
        replace(point, general=None, validation=None) != replace(plain[point.policy], validation=None)
        for point in fitted
    )


def test_general_prompts_need_only_be_answered_where_refusals_are_counted(
    place: tiny_model.Place, tmp_path: Path, general: Path
) -> None:
    said = answers(place, general.read_text().splitlines()[1::4])
    marker = said[0].split()[-1]
    refusing = replace(request(place), general=probes.read(general), refusals=(marker,))
    frontier = tune(refusing, tmp_path / "policy.toml")
    untouched = next(point for point in frontier.points if point.family == "none")
    assert untouched.general == Rate.of(sum(marker not in answer for answer in said), 10)
    assert untouched.general.value < 1


def test_input_filters_leave_general_prompts_alone(
    place: tiny_model.Place, tmp_path: Path, general: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a kind of their own, run with each adapter and with none; the closed form does the rest."""
    prompts, seen = probes.read(general), []

    def recording(safety: Tensor, kinds: list[list[Tensor]]) -> InputFilter:
        seen.append(kinds)
        return input_filter_between(safety, kinds)

    monkeypatch.setattr(filtering, "input_filter_between", recording)
    run = Experiment(replace(request(place, 2), general=prompts), tmp_path / "policy.toml")
    model = run.examples.language_model
    names = {target: name for name, target in run.fitting.targets.each[0].items()}
    fitted = prompts[::2]
    for target, (_, found) in zip(
        filtering.input_filters(run.examples, run.fitting.targets, (0, 1), [Split.training]), seen, strict=True
    ):
        assert len(found) == 3
        for inputs, adapter in zip(found, (*run.request.adapters, None), strict=True):
            with model.adapted(factors_of(adapter) if adapter else {}):
                expected = task_inputs(model, [names[target]], model.replies(fitted))
            torch.testing.assert_close(inputs, expected[names[target]])


def test_a_policy_for_others_that_was_measured_on_general_prompts_says_nothing_of_them(
    place: tiny_model.Place, tmp_path: Path, general: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, TUNED, "It is")
    frontier = tune(replace(request(place, 2), general=probes.read(general)), tmp_path / "policy.toml")
    assert frontier.verdict == "It is"
    assert all(point.general.count == 2 * 10 for point in frontier.points if point.general)


def test_a_policy_is_worth_no_more_than_what_it_makes_of_general_prompts() -> None:
    def served(family: str, general: int) -> Point:
        return replace(point(family, 40, 38), general=Rate.of(general, 40))

    plain = replace(point("none", 0, 40, 0.0), general=Rate.of(40, 40))
    chosen, verdict = recommend([plain, served("tuned", 10), served(EVERYWHERE, 39)])
    assert chosen is not None
    assert chosen.policy == EVERYWHERE
    assert "answers 0.97 (0.87 to 1.00) of the general prompts" in verdict


def test_where_refusals_are_counted_they_are_what_is_kept_of_the_alignment() -> None:
    def refusing(family: str, safety: int, refused: int) -> Point:
        return replace(point(family, safety, 38), refusals=Refusals(Rate.of(refused, 40), Rate.of(0, 40)))

    chosen, verdict = recommend([refusing("none", 0, 0), refusing("tuned", 20, 40), refusing("protect", 39, 20)])
    assert chosen is not None
    assert chosen.policy == "tuned"
    assert verdict.startswith("tuned refuses 1.00 (0.91 to 1.00) of the safety prompts and keeps 0.95")


def test_what_another_run_left_is_not_taken(place: tiny_model.Place, tmp_path: Path) -> None:
    left = tmp_path / "policy.toml.partial"
    left.write_text('{"format": 2, "identity": {}, "results": {"fit tuned 2 [0]": "of another run"}}')
    tune(request(place), tmp_path / "policy.toml")
    left.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        tune(request(place), tmp_path / "policy.toml")


def test_modules_that_no_adapter_had_get_the_mean_gains(place: tiny_model.Place, tmp_path: Path) -> None:
    whole = request(place)
    adapter = whole.adapters[0]
    selected = replace(adapter, modules=dict(list(adapter.modules.items())[:2]))
    tune(replace(whole, adapters=[selected]), tmp_path / "policy.toml")
    document = Policy.load(tmp_path / "policy.toml")
    if document.overrides:  # the best there was may be a preset
        assert document.overrides[-1].match == "*"
    csulora.correct(adapter, whole.subspace, document)


def test_adapters_need_not_have_the_same_modules(place: tiny_model.Place, tmp_path: Path) -> None:
    whole = request(place, 2)
    shares = list(tiny_model.MODULES)[:2], list(tiny_model.MODULES)[2:]
    adapters = [
        replace(adapter, modules={name: adapter.modules[name] for name in share})
        for adapter, share in zip(whole.adapters, shares, strict=True)
    ]
    differing = replace(whole, adapters=adapters, options=Options(steps=1), controls=True)
    run = Experiment(differing, tmp_path / "run.toml")
    for family in FAMILIES:
        for number, share in enumerate(shares):
            assert [override.match for override in run.policy(family, [number], 1.0).overrides] == [*sorted(share), "*"]
    frontier = tune(differing, tmp_path / "policy.toml")
    assert {point.family for point in frontier.points} >= set(FAMILIES)


def test_a_module_gets_its_own_gains_if_its_name_ends_anothers(place: tiny_model.Place, tmp_path: Path) -> None:
    shapes = {"head": (8, 8), "draft.head": (8, 8)}
    own = replace(request(place), subspace=factories.subspace(shapes), adapters=[factories.adapter(shapes)])
    names = Experiment(own, tmp_path / "run.toml").fitting.targets.modules
    policy = sweep.fitted(names, torch.tensor([[at / 4] * 4 for at in range(2)]), False, {})
    assert [attenuation(policy, name).off for name in names] == [0, 0.25]


def test_the_control_is_fitted_in_as_many_own_directions_as_it_is_measured_in(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cases = request(place, 2), list[Case]()
    first, second = whole.adapters
    thin = {name: replace(lora, b=lora.b[:, :1], a=lora.a[:1]) for name, lora in second.modules.items()}

    def recording(_: object, given: list[Case], gains: PerDirection, *rest: object) -> Tensor:
        cases.extend(given)
        return gains.start()

    monkeypatch.setattr(fitting, "fit", recording)
    run = Experiment(replace(whole, adapters=[first, replace(second, modules=thin)]), tmp_path / "run.toml")
    for number in range(2):
        policy = run.policy("tuned own subspace", [number], 1.0)
        (case,) = cases
        for name, (u, _, _) in case.update.triples.items():
            directions = next(each.directions for each in policy.overrides if each.match == case.update.targets[name])
            assert directions is not None
            assert len(directions.left) == u.shape[1] == 1
        cases.clear()


def test_input_filters_of_an_earlier_policy_do_not_matter(place: tiny_model.Place, tmp_path: Path) -> None:
    whole = request(place, 2)
    input_filters = {
        name: InputFilter(torch.ones(n, 1) / n, torch.ones(n, 1)) for name, (_, n) in tiny_model.MODULES.items()
    }
    fitted = []
    for number, subspace in enumerate((whole.subspace, whole.subspace.with_input_filters(input_filters))):
        run = Experiment(replace(whole, subspace=subspace), tmp_path / f"{number}.toml")
        fitted.append(run.policy(EVERYWHERE, (0, 1), 1.0))
    assert fitted[0] == fitted[1]


def test_what_is_held_out_anywhere_is_fitted_nowhere(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[Case] = []

    def recording(_: object, given: list[Case], gains: PerDirection, *rest: object) -> Tensor:
        cases.extend(given)
        return gains.start()

    def texts(every: list[Replies]) -> set[str]:
        return {str(reply.tokens[: reply.start].tolist()) for one in every for kind in one.kinds for reply in kind}

    monkeypatch.setattr(fitting, "fit", recording)
    whole = request(place, 2)
    task, others = whole.task[0], probes.parse(tiny_model.prompts("w22", 9).encode())
    shifted = replace(
        whole,
        task=[task, [*task[-1:], *task[:-1]]],
        general=[*task[2:9], *others],
    )
    run = Experiment(shifted, tmp_path / "policy.toml")
    seen: list[Replies] = []

    def spying(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def spy(language_model: object, names: object, replies: list[Reply]) -> dict[str, Tensor]:
            seen.append(Replies((), replies))
            return original(language_model, names, replies)

        return spy

    for name in ("task_inputs", "safety_inputs"):
        monkeypatch.setattr(filtering, name, spying(getattr(filtering, name)))
    choose(monkeypatch, TUNED)
    run.run()
    test = texts([run.examples.part(number, Split.test) for number in range(2)])
    validation = texts([run.examples.part(number, Split.validation) for number in range(2)])
    training = texts([run.examples.part(number, Split.training) for number in range(2)])
    assert not validation & test
    assert texts([case.fitted for case in cases[:-2]]) == training
    assert texts([case.fitted for case in cases[-2:]]) == training | validation  # once nothing is left to choose
    assert texts(seen) == training | validation


def test_files_that_share_prompts_in_another_order_may_leave_a_split_empty(place: tiny_model.Place) -> None:
    whole = request(place, 2)
    fitted = [whole.task[0][at] for at in (*range(0, 16, 4), *range(2, 16, 4))]
    with pytest.raises(InputError, match=r"'w21 w0 w7' has none in the validation split: .* in the same order"):
        replace(whole, task=[whole.task[0], fitted])


def test_what_cannot_be_asked_for_together_is_refused(place: tiny_model.Place) -> None:
    whole = request(place, 2)
    with pytest.raises(InputError, match=r"'w20 w1 w7' is a task prompt and a safety prompt"):
        replace(whole, task=[whole.task[0], [*whole.task[1], whole.safety[1]]])
    with pytest.raises(InputError, match=r"is a general prompt and a safety prompt; .* remove it from one file"):
        replace(whole, general=whole.safety)
    with pytest.raises(InputError, match="adapter1: is given twice"):
        replace(whole, adapters=[whole.adapters[0], whole.adapters[0]])
    with pytest.raises(InputError, match="give several, or for_others"):
        replace(request(place), limit_undo=True)


def test_the_mean_gains_are_those_of_directions_that_there_are() -> None:
    gains = torch.full((3, 3, 5), 0.9)
    gains[0, :2, :2] = torch.tensor([[0.1, 0.3], [0.2, 0.4]])
    gains[1, :2, :1] = torch.tensor([[0.8], [0.0]])
    policy = sweep.fitted_along({"a": 2, "b": 1, "c": 0}, gains, True, {})
    assert policy.overrides[-1].match == "*"
    assert policy.overrides[-1].gains == pytest.approx((0.4 * 0.2, 0.4, 0.2, 1.0))


def point(family: str, safety: int, task: int, relative_change: float = 0.5) -> Point:
    return Point(family, family, family.endswith("scaling"), Rate.of(safety, 40), Rate.of(task, 40), relative_change)


def recommend(points: list[Point]) -> tuple[Point | None, str]:
    best = best_correction(points)
    is_better, verdict = judge(best, plain_scaling(points))
    return best if is_better else None, verdict


def test_the_best_policy_is_recommended_if_its_interval_clears_plain_scaling() -> None:
    plain = [point("none", 0, 40, 0.0), point("scaling", 20, 16)]
    chosen, verdict = recommend([*plain, point("tuned", 40, 38), point("protect", 40, 30)])
    assert chosen is not None
    assert chosen.policy == "tuned"
    assert "0.95 (0.83 to 0.99)" in verdict
    chosen, verdict = recommend([*plain, point("protect", 22, 40), point("tuned scaling", 40, 40)])
    assert chosen is None
    assert verdict.startswith("No policy has a 95 % interval that lies above plain scaling: ")


def test_a_policy_is_no_better_than_the_interval_than_what_was_measured_on_fewest_prompts() -> None:
    scaling = point("scaling", 20, 20)
    few = replace(point("tuned", 40, 40), task=Rate.of(2, 2))
    assert Rate.of(2, 2).low < 0.5 < Rate.of(40, 40).low
    assert recommend([point("none", 0, 40, 0.0), scaling, few])[0] is None


def test_of_equal_scores_the_smaller_relative_change_is_recommended() -> None:
    chosen, _ = recommend([point("none", 0, 40), point("protect", 40, 40, 0.6), point("tuned", 40, 40, 0.4)])
    assert chosen is not None
    assert chosen.policy == "tuned"


def test_input_filters_are_given_up_only_for_what_is_better_than_the_interval() -> None:
    plain, everywhere = [point("none", 0, 40)], EVERYWHERE
    for task, better in ((24, "tuned"), (36, everywhere)):
        chosen, _ = recommend([*plain, point("tuned", 40, 20), point(everywhere, 40, task)])
        assert chosen is not None
        assert chosen.policy == better


Command = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(command: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["csulora", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0)

    return run


def test_the_command_line(
    place: tiny_model.Place, tmp_path: Path, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--subspace", place.subspace, "--safety", place.safety, "-o", tmp_path / "policy.toml", "--device", "cpu"]
    command = ["tune", place.aligned, place.adapters[0], *files, "--steps", 1, "--tokens", 2]
    assert run(*command, "--task", place.task) == 0
    shown, told = capsys.readouterr()
    assert "tuned random subspace" not in shown
    assert "refused" not in shown
    assert "general" not in shown.splitlines()[0]
    assert "not measured on general prompts" in " ".join(shown.split())
    assert "reported on 4 safety, 4 task, which chose nothing" in shown
    assert "tuning: fit tuned 8\n" in told
    assert re.search(r"csulora: takes .* here, and \d\.\d GB of memory\n", told)
    written = Frontier.load(tmp_path / "policy.frontier.json").written
    assert f"{tmp_path / 'policy.toml'}: {written}" in shown
    assert (": none, which corrects nothing" in shown) is (written == "none")
    assert f"{place.subspace}: the subspace file to use it with" in shown
    assert run(*command, "--task", place.task, "--task", place.task) == 2  # usage
    assert run(*command, "--task", place.task, "--task-weight", 0) == 2
    assert run(*command, "--task", place.task, "--refusal", " ") == 2
    others = ["--for-others", "--no-input-filters", "--limit-undo"]
    assert run(*command, "--task", place.task, *others, "--quick", "--all") == 0
    shown = capsys.readouterr().out
    assert "tuned everywhere" in shown
    written = Frontier.load(tmp_path / "policy.frontier.json").written
    assert (": none, which corrects nothing and refuses what is beyond the limit" in shown) is (written == "none")
    assert ("csulora adjust finds how much of it" in shown) is written.startswith(TUNED)
    assert run(*command, "--task", place.task, "--refusal", "w1", "--refusal", "w2", "--quiet") == 0
    shown, told = capsys.readouterr()
    assert not shown
    assert "csulora" not in told
    general = tmp_path / "general.txt"
    general.write_text(tiny_model.prompts("w22", 8))
    assert run(*command, "--task", place.task, "--general", general, "--quick", "--controls", "--all") == 0
    shown, told = capsys.readouterr()
    assert "general" in shown.splitlines()[0]
    assert "tuned random subspace" in shown
    assert "2 test prompts show little" in told
    assert "give 16 prompts or more in each file" in told
    assert run(*command, "--task", place.task, "--general", tmp_path / "none") == exit_codes.BAD_INPUT
    assert run(*command, "--task", tmp_path / "none") == exit_codes.BAD_INPUT
    capsys.readouterr()
    assert run(*command[:-1], 62, "--task", place.task) == exit_codes.BAD_INPUT
    assert "the model takes 64: use --tokens 61" in capsys.readouterr().err


def test_prompts_may_be_a_column(
    place: tiny_model.Place, tmp_path: Path, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    table, policy = tmp_path / "task.csv", tmp_path / "policy.toml"
    table.write_text(f"prompt\n{tiny_model.prompts('w21', 8)}")
    files = ["--subspace", place.subspace, "--safety", place.safety, "-o", policy, "--device", "cpu"]
    command = ["tune", place.aligned, place.adapters[0], *files, "--steps", 1, "--tokens", 2, "--quick"]
    assert run(*command, "--task", f"{table}#prompt") == 0
    given = probes.parse(tiny_model.prompts("w21", 8).encode())
    assert set(map(probes.prompt_hash, given)) <= set(Policy.load(policy).provenance.prompts)
    capsys.readouterr()
    assert run(*command, "--task", f"{table}#prompt", "--json", table) == exit_codes.BAD_INPUT
    assert f"{table}: is read" in capsys.readouterr().err
    table.write_text("prompt\nw21 w1 w7\n")
    assert run(*command, "--task", f"{table}#prompt") == exit_codes.BAD_INPUT
    assert "task.csv#prompt: holds 1 prompts; give 8 to 1024" in capsys.readouterr().err


def test_an_adapter_that_harms_nothing_needs_no_correction(
    place: tiny_model.Place, tmp_path: Path, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = csulora.load_adapter(place.adapters[0])
    faint = {name: replace(module, scale=1e-4) for name, module in adapter.modules.items()}
    csulora.save_adapter(replace(adapter, modules=faint), tmp_path / "faint")
    given = ["tune", place.aligned, tmp_path / "faint", "--subspace", place.subspace, "--safety", place.safety]
    given += ["--task", place.task, "-o", tmp_path / "p.toml", "--device", "cpu", "--steps", 1, "--tokens", 2]
    assert run(*given, "--quick") == 0
    told = capsys.readouterr().out
    assert "unless other safety prompts show harm, it needs no correction" in told
    assert "do not load" not in told


@pytest.mark.parametrize("beats", [True, False])
def test_a_pipeline_may_require_a_verdict(
    place: tiny_model.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beats: bool,
    run: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    choose(monkeypatch, TUNED, "so it is", is_better=beats)
    policy = tmp_path / "policy.toml"
    given = ["tune", place.aligned, place.adapters[0], "--subspace", place.subspace, "--safety", place.safety]
    given += ["--task", place.task, "-o", policy, "--device", "cpu", "--steps", 1, "--tokens", 2, "--quick"]
    code = run(*given, "--require-verdict")
    told = capsys.readouterr().err
    assert (code, policy.exists()) == ((0, True) if beats else (exit_codes.NO_VERDICT, False))
    assert frontier_path(policy).exists()
    assert (f"no policy beats plain scaling; {policy} is not written" in told) is not beats
    assert run(*given) == 0
    provenance = Policy.load(policy).provenance
    assert provenance.verdict.startswith("so it is; ")
    assert provenance.beats_plain_scaling is beats
    correct = ["correct", place.adapters[0], "--subspace", place.subspace, "--policy", policy, "-o", tmp_path / "out"]
    assert run(*correct) == 0
    told = capsys.readouterr().err
    assert (f"{policy}: csulora tune found it no better than plain scaling" in told) is not beats


def test_no_other_fit_follows_one_that_keeps_everything(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    original = Measurement.point

    def point(self: Measurement, family: str, name: str, *rest: Any) -> Point:
        measured.append(name)
        found = original(self, family, name, *rest)
        return replace(found, validation=Rate.of(4, 4)) if name == "tuned 2" else found

    monkeypatch.setattr(Measurement, "point", point)
    tune(request(place), tmp_path / "policy.toml")
    assert [name for name in measured if name.startswith("tuned")] == ["tuned 8", "tuned 2", "tuned 2 finally"]
    assert not any(name.startswith("protect") for name in measured)


def test_the_validation_split_chooses_and_the_test_split_decides() -> None:
    def chosen_by(family: str, validation: int, test: int) -> Point:
        return replace(point(family, test, 40), validation=Rate.of(validation, 40))

    plain = [chosen_by("none", 0, 0), chosen_by("scaling", 10, 30)]
    chosen, _ = recommend([*plain, chosen_by("tuned", 40, 40), chosen_by("protect", 30, 40)])
    assert chosen is not None
    assert chosen.policy == "tuned"
    assert recommend([*plain, chosen_by("tuned", 40, 32), chosen_by("protect", 30, 40)])[0] is None


def test_what_test_prompts_can_show_is_known_from_plain_scaling(place: tiny_model.Place) -> None:
    def kept(count: int) -> Point:
        return replace(point("scaling", 0, 0), validation=Rate.of(count, 8))

    whole = request(place, 2)  # 8 test prompts; Rate.of(8, 8).low is 0.68
    assert estimate.doubt_about_verdict(whole, kept(5)) is None
    assert "give 24 prompts or more" in str(estimate.doubt_about_verdict(whole, kept(6)))  # 12 / (12 + 1.96^2) > 0.75
    assert "if scaling keeps 0.75 of them, as on the validation" in str(estimate.doubt_about_verdict(whole, kept(6)))
    assert "no policy can keep more" in str(estimate.doubt_about_verdict(whole, kept(8)))


def test_a_policy_for_one_adapter_has_gains_of_single_directions(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, TUNED)
    frontier = tune(request(place), tmp_path / "policy.toml")
    policy = Policy.load(tmp_path / "policy.toml")
    subspace = csulora.Subspace.open(place.subspace)
    assert {override.match for override in policy.overrides} == set(tiny_model.MODULES)
    for override in policy.overrides:
        assert override.directions is not None
        assert len(override.directions.left) == len(override.directions.right) == subspace[override.match].rank
    _, report = csulora.correct(csulora.load_adapter(place.adapters[0]), subspace, policy)
    assert report.totals.relative_change == pytest.approx(
        next(p.relative_change for p in frontier.points if p.policy == frontier.written)
    )


def test_one_adapters_policy_may_be_for_others(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, TUNED, "It is")
    frontier = tune(replace(request(place), for_others=True), tmp_path / "policy.toml")
    policy, subspace = Policy.load(tmp_path / "policy.toml"), csulora.Subspace.open(place.subspace)
    assert policy.reference_energy == pytest.approx(
        Update.of(csulora.load_adapter(place.adapters[0]), subspace).energy_along(16)
    )
    assert policy.filtered
    doubts = "measured on the adapter it was fitted on, not on others; not measured on general prompts"
    assert frontier.verdict == f"It is; {doubts}"
    assert {point.family for point in frontier.points} >= {TUNED, EVERYWHERE}
    filtered = csulora.Subspace.open(subspace_path(tmp_path / "policy.toml"))
    csulora.correct(csulora.load_adapter(place.adapters[1]), filtered, policy)


def test_adapters_that_undo_more_than_each_given_one_may_be_refused(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, EVERYWHERE)
    notes: list[str] = []
    whole = replace(request(place, adapters=2), input_filters=False, limit_undo=True, options=Options(steps=1))
    tune(whole, tmp_path / "policy.toml", note=notes.append)
    policy = Policy.load(tmp_path / "policy.toml")
    totals = [csulora.correct(adapter, whole.subspace, policy)[1].totals.undo for adapter in whole.adapters]
    assert policy.max_total_undo == pytest.approx(max(totals), abs=2e-6)
    assert f"undo more than {policy.max_total_undo:.3f}" in notes[-1]
    factor = 10 if totals[0] > 0 else -10
    undoing = {name: replace(module, scale=factor * module.scale) for name, module in whole.adapters[0].modules.items()}
    with pytest.raises(UndoLimitError, match="the policy allows"):
        csulora.correct(replace(whole.adapters[0], modules=undoing), whole.subspace, policy)


def test_without_input_filters_nothing_is_filtered(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, EVERYWHERE)
    monkeypatch.setattr(filtering, "input_filter_between", None)  # not even looked for
    frontier = tune(replace(request(place, adapters=2), input_filters=False), tmp_path / "policy.toml")
    policy = Policy.load(tmp_path / "policy.toml")
    assert not policy.filtered
    assert policy.reference_energy
    assert "tuned" not in {point.family for point in frontier.points}
    assert not subspace_path(tmp_path / "policy.toml").exists()


def test_a_policy_for_several_adapters_reinforces_the_alignment_within_the_input_filters_of_its_subspace(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, TUNED)
    safety, task = (probes.parse(tiny_model.prompts(first, 48).encode()) for first in ("w20", "w21"))
    frontier = tune(replace(request(place, adapters=2), safety=safety, task=[task] * 2), tmp_path / "policy.toml")
    policy = Policy.load(tmp_path / "policy.toml")
    assert {override.match for override in policy.overrides} == set(tiny_model.MODULES)
    assert any(
        multiple for override in policy.overrides if override.directions for multiple in override.directions.reinforced
    )
    subspace = csulora.Subspace.open(place.subspace)
    energies = [Update.of(csulora.load_adapter(path), subspace).energy_along(16) for path in place.adapters[:2]]
    assert policy.reference_energy == pytest.approx((energies[0] * energies[1]) ** 0.5)
    filtered = csulora.Subspace.open(subspace_path(tmp_path / "policy.toml"))
    assert policy.filtered
    assert all(filtered[name].input_filter for name in tiny_model.MODULES)
    assert frontier.subspace_sha256 == policy.subspace_sha256 == filtered.sha256
    csulora.correct(csulora.load_adapter(place.adapters[1]), filtered, policy)
    with pytest.raises(RefusedError, match="tuned for the subspace file"):
        csulora.correct(csulora.load_adapter(place.adapters[1]), subspace, policy)


def test_input_filters_are_left_out_where_the_policy_is_better_without(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, EVERYWHERE)
    frontier = tune(request(place, adapters=2), tmp_path / "policy.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.frontier.json", "policy.toml"]
    policy, subspace = Policy.load(tmp_path / "policy.toml"), csulora.Subspace.open(place.subspace)
    assert not policy.filtered
    assert policy.reference_energy
    assert frontier.subspace_sha256 == policy.subspace_sha256 == subspace.sha256
    csulora.correct(csulora.load_adapter(place.adapters[1]), subspace, policy)
