"""What the directory guard publishes of adapters that a server adds up."""

import json
import shutil
from pathlib import Path

import pytest

import csulora
import factories
from csulora.errors import InputError
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options
from csulora.serving.guard.plan import plan
from csulora.serving.guard.together import PlannedSets, Sets

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def subspace(tmp_path_factory: pytest.TempPathFactory) -> csulora.Subspace:
    directory = tmp_path_factory.mktemp("subspace")
    return csulora.extract(*factories.model_pair(directory), rank=4, output=directory / "subspace")


class Place:
    """A guarded directory."""

    def __init__(self, directory: Path, subspace: csulora.Subspace) -> None:
        self.subspace, self.log = subspace, directory / "decisions.jsonl"
        self.incoming, self.outgoing = directory / "incoming", directory / "outgoing"
        self.incoming.mkdir()

    def upload(self, name: str, undo: float) -> None:
        shutil.rmtree(self.incoming / name, ignore_errors=True)
        factories.opposing_adapter(self.incoming / name, self.subspace, MODULES, undo)

    def scan(self, *together: str, policy: csulora.Policy | None = None, jobs: int = 1) -> list[str]:
        """Run a guard once, and return what is published."""
        gate = Gate.open(self.subspace, policy or csulora.Policy.none(max_undo=0.5), self.log)
        options = Options(settle=0, patience=0, jobs=jobs, together=together)
        assert DirectoryGuard(self.incoming, self.outgoing, gate, options, say=lambda line: None).run(watch=False)
        return sorted(path.name for path in self.outgoing.iterdir() if path.is_dir())

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        lines = map(json.loads, self.log.read_text().splitlines())
        return [(line["name"], line["verdict"]) for line in lines]


@pytest.fixture
def place(tmp_path: Path, subspace: csulora.Subspace) -> Place:
    return Place(tmp_path, subspace)


def test_the_one_that_would_be_too_much_is_refused(place: Place) -> None:
    place.upload("team-a", 0.3)
    place.upload("team-b", 0.3)
    place.upload("other", 0.4)

    assert place.scan("team-*") == ["other", "team-a"]

    refusal = json.loads((place.outgoing / "team-b.refused.json").read_text())
    assert refusal["reason_code"] == "undo-together"
    assert "team-a + team-b: undo 0.600 of the alignment" in refusal["reason"]
    assert sorted(place.verdicts) == [("other", "corrected"), ("team-a", "corrected"), ("team-b", "refused")]


def test_served_apart_both_are_published(place: Place) -> None:
    place.upload("team-a", 0.3)
    place.upload("team-b", 0.3)

    assert place.scan() == ["team-a", "team-b"]
    assert place.scan("team-*") == ["team-a"] or place.scan("team-*") == ["team-b"]  # once they are to be added


def test_a_refusal_is_decided_on_again_once_another_member_changes(place: Place) -> None:
    place.upload("team-a", 0.3)
    place.upload("team-b", 0.3)
    place.scan("team-*")
    count = len(place.verdicts)

    assert place.scan("team-*") == ["team-a"]
    assert len(place.verdicts) == count  # nothing changed

    place.upload("team-a", 0.1)
    assert place.scan("team-*") == ["team-a", "team-b"]
    assert not (place.outgoing / "team-b.refused.json").exists()


def test_a_set_needs_a_limit(place: Place) -> None:
    with pytest.raises(InputError, match="and the policy has none; set one in it"):
        place.scan("team-*", policy=csulora.Policy.project())


@pytest.mark.parametrize("sets", [Sets, PlannedSets])
def test_an_empty_glob_is_not_taken_for_a_set_of_nothing(sets: type[Sets], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty; name them, or leave it out"):
        sets(["a*", ""], tmp_path)


def test_members_that_are_decided_on_at_a_time_do_not_pass_each_other(place: Place) -> None:
    for name in "abcd":
        place.upload(f"team-{name}", 0.3)

    assert len(place.scan("team-*", jobs=4)) == 1


def test_other_rules_without_a_limit_do_not_come_into_force(place: Place) -> None:
    place.upload("team-a", 0.3)
    gates = iter([Gate.open(place.subspace, csulora.Policy.none())])
    said: list[str] = []
    guard = DirectoryGuard(
        place.incoming,
        place.outgoing,
        Gate.open(place.subspace, csulora.Policy.none(max_undo=0.5), place.log),
        Options(settle=0, patience=0, together=("team-*",)),
        say=said.append,
        reopen=lambda: next(gates),
    )

    guard._read_rules_again()

    assert guard.gate.policy.max_undo == 0.5
    assert "the policy has none" in said[-1]


def test_a_member_that_cannot_be_measured_lets_no_other_in(place: Place) -> None:
    place.upload("team-a", 0.1)
    (place.outgoing / "team-b").mkdir(parents=True)

    with pytest.raises(InputError, match="what is served together with others cannot be measured"):
        place.scan("team-*")

    assert not (place.outgoing / "team-a").exists()


def planned(place: Place, *together: str) -> dict[str, str | None]:
    """What a plan says of each upload: corrected, or the reason's code."""
    gate = Gate.open(place.subspace, csulora.Policy.none(max_undo=0.5))
    return {row.name: row.reason_code for row in plan(place.incoming, place.outgoing, gate, together=together)}


def test_a_plan_says_what_a_set_will_refuse(place: Place) -> None:
    for name, undo in {"other": 0.4, "team-a": 0.3, "team-b": 0.3, "team-c": 0.1}.items():
        place.upload(name, undo)

    assert set(planned(place).values()) == {None}
    assert planned(place, "team-*") == {"other": None, "team-a": None, "team-b": "undo-together", "team-c": None}
    assert not place.outgoing.exists()
    assert place.scan("team-*") == ["other", "team-a", "team-c"]


def test_a_plan_counts_what_is_published(place: Place) -> None:
    place.upload("team-b", 0.3)
    place.upload("team-gone", 0.1)
    place.scan("team-*")
    shutil.rmtree(place.incoming / "team-gone")  # and stays published
    place.upload("team-a", 0.2)

    assert planned(place, "team-*") == {"team-a": "undo-together", "team-b": None}
    assert place.scan("team-*") == ["team-b", "team-gone"]

    place.upload("team-b", 0.1)
    assert planned(place, "team-*") == {"team-a": "undo-together", "team-b": None}  # whose old result still stood
    place.upload("team-b", 0.9)
    assert planned(place, "team-b") == {"team-a": None, "team-b": "undo-limit"}


def test_a_plan_of_sets_needs_a_limit(place: Place) -> None:
    gate = Gate.open(place.subspace, csulora.Policy.none())
    with pytest.raises(InputError, match="the policy has none; set one in it"):
        list(plan(place.incoming, place.outgoing, gate, together=["team-*"]))
