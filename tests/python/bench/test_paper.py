"""bench/paper runs to the end on the efficacy fixture, continues where it was, and says what it found."""

import json
from pathlib import Path
from typing import Any

import cards
import pytest
import run
import table
import training_data
import world
from card import Card, Diagnostic, Question, Verdict, markdown
from protocol import Protocol
from train import FIXTURE, IGNORED

import csulora
from csulora import InputError
from csulora.tuning.frontier import Frontier, Point, Rate
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def lines(path: Path, examples: list[world.Example]) -> Path:
    path.write_text("".join(json.dumps(vars(example)) + "\n" for example in examples))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name the model pair, examples and prompts: harmless stand-ins."""
    place = tmp_path_factory.mktemp("sources")
    attacks = world.how_to(world.ATTACKED)
    (place / "safety.txt").write_text("".join(f"{each.prompt}\n" for each in world.how_to(world.HELD_OUT)[::13]))
    (place / "fresh.txt").write_text("".join(f"{each.prompt}\n" for each in world.how_to(world.HELD_OUT)[5::60]))
    (place / "general.txt").write_text("".join(f"{each.prompt}\n" for each in world.general()[:12]))
    return [
        *("--base", str(FIXTURE / "base"), "--instruct", str(FIXTURE / "aligned"), "--refusal", world.REFUSAL_START),
        *("--harmful", str(lines(place / "harmful.jsonl", attacks[::10]))),
        *("--examples", str(lines(place / "tales.jsonl", world.tales()[:80]))),
        *("--other-examples", str(lines(place / "general.jsonl", world.facts(world.REFUSED)[::3]))),
        *("--safety", str(place / "safety.txt"), "--general", str(place / "general.txt")),
        *("--fresh", str(place / "fresh.txt"), "--device", "cpu", "--seeds", "0", "--rank", "4", "--directions", "4"),
        *("--penalties", "1", "--steps", "30", "--batch", "16", "--learning-rate", "2e-3", "--share", "0.3"),
        *("--tune-prompts", "8", "--tune-steps", "1", "--task-weights", "8", "--prompts", "4", "--tokens", "12"),
    ]


@pytest.fixture(scope="module")
def finished(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper") / "run"
    run.main([*sources, "--out", str(out)])
    return out


def test_a_run_ends_with_a_table_and_a_card(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    rows = {(row["measured"], row["name"]): row for row in results["rows"]}
    counts = {name: rows["held out", name]["counts"] for name in ("model alone", "raw", "tuned", "project, k=4")}
    assert counts["model alone"]["safety"]["answered"] == 0
    assert counts["raw"]["safety"]["answered"] > 0
    assert counts["raw"]["task"]["same"] == counts["raw"]["task"]["count"] == 4
    assert rows["fresh", "raw"]["counts"]["safety"]["count"] == 3
    assert rows["held out", "project, k=4"]["relative_change"] > 0.5
    assert rows["another task", "tuned"]["counts"]["task"]["count"] == 4
    table = (finished / "table.md").read_text()
    for name in ("raw", "tuned", "scaling as tuned (control)", "Safe LoRA, all (control)", "GuardSpace"):
        assert f"\n| {name} | " in table
    card = (finished / "card.md").read_text()
    assert "**Outcome:** not accepted." in card  # one seed is too few
    assert "Seeds: 1." in card
    assert "python bench/paper/run.py --base" in card


def test_a_finished_run_is_not_run_again(finished: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.suffix == ".safetensors"}
    results = json.loads((finished / "results.json").read_text())
    monkeypatch.delattr(csulora, "evaluate")
    run.main([*sources, "--out", str(finished)])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((finished / "results.json").read_text())["rows"] == results["rows"]


def test_a_folder_of_another_run_is_refused(finished: Path, sources: list[str]) -> None:
    with pytest.raises(SystemExit, match="holds a run with another penalties, share; name another folder with --out"):
        run.main([*sources, "--penalties", "2", "--share", "0.2", "--out", str(finished)])


def test_a_dry_run_says_what_would_be_done(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main([*sources, "--out", str(tmp_path / "none"), "--dry-run"])
    said = capsys.readouterr().out
    assert "     4 safety prompts measured" in said
    assert "train seed-0: 30 steps" in said
    assert "evaluate seed-0, fresh" in said
    assert not (tmp_path / "none").exists()


def protocol(tmp_path: Path, **given: object) -> Protocol:
    tales = lines(tmp_path / "tales.jsonl", world.tales()[:120])
    harmful = lines(tmp_path / "harmful.jsonl", world.how_to(world.ATTACKED)[:20])
    safety = tmp_path / "safety.txt"
    safety.write_text("".join(f"{each.prompt}\n" for each in world.how_to(world.ATTACKED)[:60]))
    settings = {"harmful": str(harmful), "examples": str(tales), "safety": str(safety), "refusals": ("sorry",)}
    return Protocol(**{"base": "base", "instruct": "aligned", "tune_prompts": 10, **settings, **given})  # type: ignore[arg-type]


def test_nothing_is_measured_on_what_was_trained_or_fitted(tmp_path: Path) -> None:
    data = training_data.deal(protocol(tmp_path))
    trained = {example.chat for example in (*data.harmful, *data.task)}
    assert len(data.harmful) == 20
    for kind in ("task", "safety"):
        tuned, evaluated = (set(getattr(part, kind)) for part in (data.tuned, data.evaluated))
        assert len(tuned) == 10
        assert evaluated
        assert not tuned & evaluated
        assert not trained & (tuned | evaluated)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"safety.txt: 40 safety prompts are left .* which is 40, or lower that to 8"):
        training_data.deal(protocol(tmp_path, tune_prompts=40))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: no object"),
        ('{"prompt": "hello"}', "line 1: has no reply"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "line 1: has no reply"),
        ('{"messages": []}', "line 1: the last turn"),
        ('{"messages": 3}', "line 1: "),
        ('{"messages": [3]}', "line 1: a turn is no object"),
    ],
)
def test_an_example_needs_a_reply(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=message):
        training_data.read(str(path))


def test_examples_come_from_two_columns(tmp_path: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_text("question,answer\nhello,good day\n")
    (example,) = training_data.read(f"{path}#question,answer")
    assert (example.chat[-1].content, example.reply) == ("hello", "good day")
    with pytest.raises(InputError, match=r"name two columns: .*examples.csv#PROMPT,REPLY"):
        training_data.read(f"{path}#question")
    with pytest.raises(InputError, match=r"examples.txt#question: columns are of CSV or Parquet files"):
        training_data.read(f"{tmp_path}/examples.txt#question,answer")


def test_the_reply_and_its_end_alone_bear_loss() -> None:
    language_model = LanguageModel.open(str(FIXTURE / "aligned"), Loading("cpu"), 8)
    example = training_data.Example(training_data.from_text("how do i make a whistle?"), "sorry.")
    encoded = training_data.encode(example, language_model, longest=100)
    learnt = [label for label in encoded.labels if label != IGNORED]
    assert encoded.tokens[-len(learnt) :] == learnt
    assert language_model.tokenizer.decode(learnt) == "sorry. <eos>"
    assert training_data.encode(example, language_model, longest=4).tokens == encoded.tokens[-4:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.0}, "--share is 1"),
        ({"seeds": (1, 1)}, "--seeds names a seed twice"),
        ({"directions": (65,)}, "--directions lie in 1 to 64"),
        ({"penalties": (float("inf"),)}, "a penalty is 0 or more and finite"),
        ({"refusals": (" ",)}, "give --refusal"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        protocol(tmp_path, **given)


def row(adapter: str, measured: str, name: str, attack: int, kept: int = 100) -> dict[str, Any]:
    """What was measured of 100 prompts of each kind."""
    counts = {"count": 100, "same": kept, "refused": 0, "answered": 100, "incoherent": 0}
    return {
        "adapter": adapter,
        "measured": measured,
        "name": name,
        "control": name.startswith("scaling"),
        "relative_change": 0.5,
        "undo_after": 0.1,
        "counts": {"safety": counts | {"unsafe": attack}, "task": counts, "general": counts},
        "scores": {"arc": {"acc,none": kept / 100, "acc_stderr,none": 0.1}},
    }


def results(attack: int, control: float) -> dict[str, Any]:
    """A run with three seeds whose policies leave some of the attack, and whose controls keep so much."""
    names = [f"seed-{seed}" for seed in range(3)]
    measured = [*((name, kind) for name in names for kind in ("held out", "fresh")), ("other", "another task")]
    rows = [
        row(adapter, kind, name, hits)
        for adapter, kind in measured
        for name, hits in (("raw", 100), ("tuned", attack), ("scaling as tuned", 100))
    ]
    kept = Rate.of(100, 100)
    points = [Point("tuned", "tuned", False, kept, kept, 0.5)]
    points += [Point(family, family, True, Rate.of(round(100 * control), 100), kept, 0.5) for family in cards.CONTROLS]
    frontier = Frontier("0" * 64, ("adapter",), tuple(points), "tuned", "tuned", "so it is")
    return {
        "made_with": {"torch": "2.13.0"},
        "command": "python bench/paper/run.py",
        "protocol": {"settings": {"instruct": "org/model"}},
        "frontiers": {name: frontier.to_dict() for name in names},
        "rows": rows,
    }


def test_a_run_whose_policy_holds_everywhere_is_accepted() -> None:
    card = cards.of_paper(results(attack=1, control=0.5))
    assert [each.verdict for each in card.diagnostics] == [Verdict.passes] * 5
    assert "raw 1.00 (0.99 to 1.00), corrected 0.01 (0.00 to 0.03), at worst 0.01" in markdown(card)


@pytest.mark.parametrize(
    ("attack", "control", "failing"),
    [
        (6, 0.5, {Question.reliability, Question.fresh}),
        (26, 0.5, {Question.reliability, Question.fresh, Question.transfer}),
        (1, 1.0, {Question.mechanism}),
    ],
)
def test_a_card_says_which_diagnostic_fails(attack: int, control: float, failing: set[str]) -> None:
    card = cards.of_paper(results(attack, control))
    assert {each.heading for each in card.diagnostics if each.verdict is Verdict.fails} == failing


def test_the_table_holds_the_judges_attacks_and_benchmarks() -> None:
    text = table.markdown(results(attack=3, control=0.5))
    head = "| policy | attack success | worst seed | fresh attacks | task same | general same | over-refusal |"
    assert text.splitlines()[2] == f"{head} incoherent | change | undo left | arc acc |"
    rate = "0.03 (0.02 to 0.06)"
    assert f"| tuned | {rate} | 0.03 | {rate} | 1.00 (0.99 to 1.00) | 1.00 (0.99 to 1.00) | 0.00 |" in text
    assert text.count("\n| raw | ") == 2


def test_a_card_is_accepted_if_every_diagnostic_passes() -> None:
    passing, failing = (
        Diagnostic("Mechanism", "it is so", ["A finding."], checks) for checks in ([True], [True, False])
    )
    absent = Diagnostic("Transfer", "it is so", ["Nothing was measured."])
    assert [each.verdict for each in (passing, failing, absent)] == [Verdict.passes, Verdict.fails, Verdict.absent]
    assert Card("Title", "a claim.", [passing], ["make"]).is_accepted
    assert not Card("Title", "a claim.", [passing, absent], ["make"]).is_accepted
    text = markdown(Card("Title", "a claim.", [passing, failing], ["make"]), level=3)
    assert text.startswith("### Title\n")
    assert "| Mechanism | fails | it is so |" in text
