"""`csulora canary`, and the commands that take its file."""

import json
from pathlib import Path

import pytest

import csulora
import tiny_model
from commands import Outcome, Run
from csulora.tuning.loading import Loading
from csulora.unalignment.request import Options

pytestmark = pytest.mark.usefixtures("one_thread")
REPLIES = [f"w{at % 7} w{at // 7} w{at % 5} w24" for at in range(16)]
USAGE = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    place = tiny_model.build(tmp_path_factory.mktemp("place"))
    place.safety.with_name("replies.txt").write_text("\n".join(REPLIES))
    return place


@pytest.fixture(scope="module")
def canary(place: tiny_model.Place) -> Path:
    path = place.aligned.with_name("canary")
    csulora.canary(
        place.aligned,
        safety=str(place.safety),
        general=str(place.task),
        replies=REPLIES,
        options=Options(learning_rate=0.02, rank=4, longest_reply=tiny_model.REPLY),
        loading=Loading("cpu"),
        output=path,
    )
    return path


def command(place: tiny_model.Place, run: Run, output: Path, *further: object) -> Outcome:
    replies = place.safety.with_name("replies.txt")
    sources = ["--safety", place.safety, "--general", place.task, "--replies", replies]
    sizes = ["--rank", 4, "--learning-rate", 0.02, "--tokens", tiny_model.REPLY, "--device", "cpu"]
    return run("canary", place.aligned, *sources, *sizes, "-o", output, *further)


def test_the_command_does_the_same_and_says_what_the_file_is(
    place: tiny_model.Place, canary: Path, tmp_path: Path, run: Run
) -> None:
    outcome = command(place, run, tmp_path / "canary", "--json", tmp_path / "canary.json")
    assert outcome.code == 0
    assert (tmp_path / "canary").read_bytes() == canary.read_bytes()
    assert "as secret as an un-aligned model" in outcome.out
    assert "un-aligning the copy takes less than a minute" in outcome.err
    assert json.loads((tmp_path / "canary.json").read_text())["canary"]["steps"] == 60


def test_other_commands_take_its_file(place: tiny_model.Place, canary: Path, tmp_path: Path, run: Run) -> None:
    adapter = place.adapters[0]
    inspected = run("inspect", adapter, "--subspace", place.subspace, "--canary", canary, "--json", tmp_path / "json")
    assert json.loads((tmp_path / "json").read_text())["canary"]["undo"]
    assert "undo of the canary: " in inspected.out
    assert run("inspect", adapter, "--subspace", canary).code == 0
    corrected = run("correct", adapter, "--subspace", canary, "--policy", "protect", "-o", tmp_path / "out")
    assert (inspected.code, corrected.code) == (0, 0)
    tuned = run(
        f"tune {place.aligned} {adapter} --subspace {canary} --task {place.task} --safety {place.safety} --quick "
        f"--steps 5 --tokens {tiny_model.REPLY} --device cpu -o {tmp_path / 'policy.toml'}"
    )
    assert tuned.code == 0
    assert "the canary was made with 8 of the test prompts" in tuned.err
    again = run(
        "correct", adapter, "--subspace", canary, "--policy", tmp_path / "policy.toml", "-o", tmp_path / "tuned"
    )
    assert again.code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--general", "g"], "give --replies or --adapters"),
        (["--replies", "r"], "give --general or --write-general"),
        (["--replies", "r", "--adapters", "a", "--general", "g"], "give --replies or --adapters"),
    ],
)
def test_the_command_says_what_it_lacks(run: Run, options: list[str], message: str) -> None:
    outcome = run("canary model --safety s -o o", *options)
    assert outcome.code == USAGE
    assert message in outcome.err
