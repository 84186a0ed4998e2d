"""`csulora adjust` on the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import csulora
import tiny_model
from commands import Run
from csulora.cli import exit_codes
from csulora.errors import RefusedError
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    """The tiny model pair, with adapters that do little else than take the alignment back."""
    directory = tmp_path_factory.mktemp("place")
    place = tiny_model.build(directory)
    subspace = csulora.Subspace.open(place.subspace)
    one, other = (
        tiny_model.adapter(directory / f"undoing{seed}", subspace, seed, besides=1e-4 * seed) for seed in (1, 2)
    )
    return replace(place, adapters=(one, other))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    directions = Directions((1.0, 1.0), (1.0, 1.0), (0.5, 0.5))
    Policy.none(overrides=(Override("*", directions=directions),)).save(tmp_path / "carried.toml")
    return tmp_path / "carried.toml"


def command(place: tiny_model.Place, policy: Path, adapters: int, *further: object) -> list[object]:
    files = ["--subspace", place.subspace, "--policy", policy, "--safety", place.safety]
    return [
        place.aligned,
        *place.adapters[:adapters],
        *files,
        "--tokens",
        tiny_model.REPLY,
        "--device",
        "cpu",
        *further,
    ]


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Let nothing but this come of an adapter."""
    from csulora.tuning.adjust import Adjuster

    adjust = Adjuster.adjust

    def raising(self: Adjuster, adapter: csulora.Adapter, *further: Any) -> object:
        if adapter.path.name == name:
            raise error
        return adjust(self, adapter, *further)

    monkeypatch.setattr(Adjuster, "adjust", raising)


def test_one_adapter_gets_a_policy_that_correct_takes(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    written = tmp_path / "adjusted.toml"
    done = run("adjust", *command(place, policy, 1, "-o", written, "--least", 0.1, "--json", tmp_path / "found.json"))
    assert done.code == 0, done.err
    entry = json.loads((tmp_path / "found.json").read_text())["adapters"][str(place.adapters[0])]
    assert entry["strength"] > 1
    assert entry["kept"]["safety"]["value"] > entry["before"]["safety"]["value"]
    assert f"wrote {written}" in done.out
    sha256 = csulora.load_adapter(place.adapters[0]).sha256
    assert Policy.load(written) == Policy.load(policy).with_strength(sha256, entry["strength"])
    files = ["--subspace", place.subspace, "--policy", written, "-o", tmp_path / "corrected"]
    assert run("correct", place.adapters[0], *files).code == 0
    done = run("correct", place.adapters[1], *files[:-1], tmp_path / "other")
    assert (done.code, "find its strength with `csulora adjust`" in done.err) == (exit_codes.REFUSED, True)
    verified = run("verify", tmp_path / "corrected", place.adapters[0], place.subspace, "--policy", written)
    assert verified.code == 0, verified.err
    verified = run("verify", tmp_path / "corrected", place.adapters[0], place.subspace, "--policy", policy)
    assert verified.code == exit_codes.REFUSED


def test_what_keeps_too_little_is_refused_and_gets_no_policy(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    Policy.load(policy).strengthened(1e-6).save(policy)
    done = run("adjust", *command(place, policy, 1, "-o", tmp_path / "adjusted.toml", "--least", 1))
    assert done.code == exit_codes.REFUSED
    assert "of the safety prompts, and 1 is asked (--least); fit a policy to this adapter" in done.err
    assert not (tmp_path / "adjusted.toml").exists()


def test_where_every_adapter_is_refused_nothing_is_printed_but_why(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    replace(Policy.load(policy), max_total_undo=0.1).save(policy)
    done = run("adjust", *command(place, policy, 2, "-o", tmp_path / "out.toml"))
    assert (done.code, done.out) == (exit_codes.REFUSED, "")
    for adapter in place.adapters:
        assert f"csulora: refused: {adapter}: all modules together undo 1.000 of their alignment" in done.err
    assert not (tmp_path / "out.toml").exists()


def test_an_error_that_names_no_adapter_is_said_with_it(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    other = replace(csulora.load_adapter(place.adapters[0]), path=tmp_path / "unsaved")
    modules = {name.replace("layers.1", "layers.7"): module for name, module in other.modules.items()}
    config = other.config | {"target_modules": list(modules)}
    csulora.save_adapter(replace(other, modules=modules, config=config), tmp_path / "deeper")
    replace(Policy.load(policy), keep_uncovered=("*",)).save(policy)
    done = run("adjust", *command(place, policy, 1, tmp_path / "deeper", "-o", tmp_path / "out.toml", "--least", 0))
    assert done.code == exit_codes.BAD_INPUT
    assert f"csulora: error: {tmp_path / 'deeper'}: the model has no module model.layers.7." in done.err


def test_progress_is_told_in_lines_where_nobody_sees_a_bar(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    arguments = command(place, policy, 2, "-o", tmp_path / "out.toml", "--least", 0)
    lines = [line for line in run("adjust", *arguments).err.splitlines() if line.startswith("csulora:")]
    assert lines == ["csulora:   0% adjusting: undoing1", "csulora:  50% adjusting: undoing2"]
    assert "csulora:" not in run("adjust", *arguments, "--quiet").err


def test_a_policy_that_tune_found_no_better_than_plain_scaling_is_told(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    provenance = PolicyProvenance(verdict="none is better", beats_plain_scaling=False)
    replace(Policy.load(policy), provenance=provenance).save(policy)
    done = run("adjust", *command(place, policy, 1, "-o", tmp_path / "adjusted.toml", "--least", 0))
    assert (done.code, f"{policy}: csulora tune found it no better than plain scaling" in done.err) == (0, True)


def test_ctrl_c_leaves_the_strengths_that_are_found(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "undoing2", KeyboardInterrupt())
    done = run("adjust", *command(place, policy, 2, "-o", tmp_path / "out.toml", "--least", 0))
    assert done.code == exit_codes.INTERRUPTED
    assert f"csulora: interrupted: {tmp_path / 'out.toml'} has the strengths that were found" in done.err
    [(sha256, _)] = Policy.load(tmp_path / "out.toml").strengths
    assert sha256 == csulora.load_adapter(place.adapters[0]).sha256


def test_each_of_several_adapters_gets_its_own_and_one_that_fails_stops_no_other(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "broken").mkdir()
    further = [tmp_path / "broken", "-o", tmp_path / "out.toml", "--least", 0.1, "--json", "-"]
    done = run("adjust", *command(place, policy, 2, *further))
    assert done.code == exit_codes.BAD_INPUT
    found = json.loads(done.out)["adapters"]
    assert f"csulora: error: {tmp_path / 'broken'}" in done.err
    assert "error" in found[str(tmp_path / "broken")]
    strengths = {csulora.load_adapter(path).sha256: found[str(path)]["strength"] for path in place.adapters}
    assert dict(Policy.load(tmp_path / "out.toml").strengths) == strengths


def test_an_adapter_is_asked_its_task_too(place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run) -> None:
    further = ["-o", tmp_path / "out.toml", "--least", 0, "--json", "-"]
    done = run("adjust", *command(place, policy, 2, "--task", place.task, *further))
    assert done.code == 0, done.err
    kept = [entry["kept"]["task"] for entry in json.loads(done.out)["adapters"].values()]
    assert [each["count"] for each in kept] == [16, 16]
    files = ["--task", place.task] * 3
    done = run("adjust", *command(place, policy, 2, *files, *further))
    assert (done.code, "2 adapters take one --task for all or one for each, not 3" in done.err) == (2, True)


def test_an_adapter_that_is_given_twice_keeps_its_strength(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run
) -> None:
    copy = Path(shutil.copytree(place.adapters[0], tmp_path / "copy"))
    done = run("adjust", *command(place, policy, 1, copy, "-o", tmp_path / "out.toml", "--least", 0))
    assert (done.code, f"{copy}: is given twice" in done.err) == (exit_codes.BAD_INPUT, True)
    [(sha256, strength)] = Policy.load(tmp_path / "out.toml").strengths
    assert (sha256, strength > 1) == (csulora.load_adapter(copy).sha256, True)


def test_strengths_of_others_stay_and_one_that_is_refused_loses_its_own(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (csulora.load_adapter(path).sha256 for path in place.adapters)
    Policy.load(policy).with_strength(one, 0.0).with_strength(other, 0.0).with_strength("0" * 64, 0.5).save(policy)
    done = run("adjust", *command(place, policy, 1, "-o", tmp_path / "again.toml", "--least", 0.1))
    assert done.code == 0, done.err
    again = dict(Policy.load(tmp_path / "again.toml").strengths)
    assert again[one] > 1
    assert {key: each for key, each in again.items() if key != one} == {other: 0.0, "0" * 64: 0.5}
    refuse(monkeypatch, "undoing1", RefusedError("it keeps too little"))
    done = run("adjust", *command(place, policy, 2, "-o", tmp_path / "fewer.toml", "--least", 0.1))
    assert (done.code, "it keeps too little" in done.err) == (exit_codes.REFUSED, True)
    assert dict(Policy.load(tmp_path / "fewer.toml").strengths).keys() == {other, "0" * 64}


def test_what_cannot_be_is_said_before_the_model_is_loaded(
    place: tiny_model.Place, policy: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csulora.tuning.language_model import LanguageModel

    def never(*_: object) -> LanguageModel:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(LanguageModel, "open", never)
    output = ["-o", tmp_path / "adjusted.toml"]
    assert run("adjust", *command(place, policy, 1, "-o", policy)).code == exit_codes.BAD_INPUT
    assert run("adjust", *command(place, policy, 1, *output, "--refusal", " ")).code == 2
    assert run("adjust", *command(place, policy, 1, *output, "--least", 2)).code == 2
    assert run("adjust", *command(place, policy, 1, "-o", tmp_path)).code == exit_codes.BAD_INPUT
    done = run("adjust", *command(place, policy, 1, *output, "--general", place.safety))
    assert (done.code, "is a general prompt and a safety prompt" in done.err) == (exit_codes.BAD_INPUT, True)
    given = Policy.load(policy)
    replace(given, subspace_sha256="0" * 64).save(policy)
    done = run("adjust", *command(place, policy, 2, "-o", tmp_path / "out.toml"))
    assert (done.code, "tuned for the subspace file 000" in done.err) == (exit_codes.REFUSED, True)
    assert not (tmp_path / "out.toml").exists()
    Policy.protect().save(policy)
    done = run("adjust", *command(place, policy, 1, *output))
    assert (done.code, "reinforces nothing" in done.err) == (exit_codes.BAD_INPUT, True)
    assert run("adjust", *command(place, tmp_path / "none.toml", 1, *output)).code == exit_codes.BAD_INPUT
    assert csulora.Policy.load(policy) == Policy.protect()
    given.save(policy)
    done = run("adjust", *command(place, policy, 0, tmp_path / "nothing", *output))
    assert (done.code, f"{tmp_path / 'nothing'}: " in done.err) == (exit_codes.BAD_INPUT, True)
