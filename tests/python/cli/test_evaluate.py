"""`csulora evaluate` on the command line."""

import json
from pathlib import Path

import pytest

import csulora
import tiny_model
from commands import Run
from csulora.cli import exit_codes
from csulora.policy.provenance import PolicyProvenance
from csulora.tuning import probes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


@pytest.fixture
def command(place: tiny_model.Place, tmp_path: Path) -> str:
    first = f"evaluate {place.aligned} {place.adapters[0]} --subspace {place.subspace} --task {place.task}"
    return f"{first} --safety {place.safety} --tokens {tiny_model.REPLY} --device cpu -o {tmp_path / 'found.json'}"


def test_presets_raw_and_scaling_stand_in_one_table(command: str, run: Run, tmp_path: Path) -> None:
    outcome = run(command, "--refusal", "w1")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "adapter1: 16 safety prompts, 16 task prompts"
    firsts = [line.split("  ")[0] for line in lines]
    assert firsts[3:5] == ["model alone", "raw"]
    assert {"csulora", "project", "protect"} <= set(firsts)
    told = [line for line in outcome.err.splitlines() if "evaluating" in line]  # no progress bar in a pipe
    assert told[0] == "csulora:   0% evaluating: model alone: safety"
    assert len(told) == len(set(told)) == 2 * 8  # kinds of prompts, and rows
    rows = json.loads((tmp_path / "found.json").read_text())["adapters"][0]["rows"]
    assert len(rows) == 2 + 2 * 3


def test_a_refusal_that_the_model_never_says_is_told(command: str, run: Run) -> None:
    outcome = run(command, "--policy", "none", "--refusal", "nobody_says_this")
    assert "The aligned model refuses no safety prompt, as far as --refusal tells" in outcome.out


def test_a_tuned_policy_is_found_with_its_own_subspace_file(
    command: str, run: Run, place: tiny_model.Place, tmp_path: Path
) -> None:
    other = csulora.extract(place.aligned.with_name("base"), place.aligned, rank=1, modules=list(tiny_model.MODULES))
    policy = csulora.Policy.project(subspace_sha256=other.sha256)
    policy.save(tmp_path / "mine.toml")
    missing = run(command, "--policy", tmp_path / "mine.toml")
    assert missing.code == exit_codes.BAD_INPUT
    assert "put that one beside it as mine.subspace.safetensors" in missing.err
    other.save(tmp_path / "mine.subspace.safetensors")
    outcome = run(command, "--policy", tmp_path / "mine.toml", "--policy", "project")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\nmine") == 2
    assert run(command, "--policy", "project", "--policy", "project").code == 2


def test_prompts_that_a_policy_has_seen_are_refused(
    command: str, run: Run, place: tiny_model.Place, tmp_path: Path
) -> None:
    seen = tuple(map(probes.prompt_hash, probes.read(place.task)))
    csulora.Policy.project(provenance=PolicyProvenance(seen)).save(tmp_path / "mine.toml")
    outcome = run(command, "--policy", tmp_path / "mine.toml")
    assert outcome.code == exit_codes.BAD_INPUT
    assert "policy 'mine' was tuned with 16 of the prompts" in outcome.err


def test_wrong_options_are_told(command: str, run: Run, place: tiny_model.Place) -> None:
    assert run(command, "--task", place.task).code == 2
    assert run(command, "--refusal", " ").code == 2
    assert run(f"{command} --device-map auto").code == 2
