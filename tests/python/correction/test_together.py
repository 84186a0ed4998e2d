import math
from dataclasses import replace
from pathlib import Path

import pytest

import csulora
import factories
from csulora.correction.together import Undone, check_together
from csulora.errors import UndoTogetherError

NAME = "model.layers.0.self_attn.q_proj"
MODULES = {NAME: (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def subspace(tmp_path_factory: pytest.TempPathFactory) -> csulora.Subspace:
    directory = tmp_path_factory.mktemp("subspace")
    return csulora.extract(*factories.model_pair(directory), rank=4, dtype="f32")


def test_undo_of_a_sum_is_that_of_the_combined_adapter(subspace: csulora.Subspace, tmp_path: Path) -> None:
    """Also where the adapters have other ranks and modules, and name a module otherwise."""
    one = csulora.load_adapter(factories.save_adapter(tmp_path / "one", MODULES, seed=1))
    shorter = {NAME.removeprefix("model."): (48, 48)}
    two = csulora.load_adapter(factories.save_adapter(tmp_path / "two", shorter, rank=3, seed=9, use_rslora=True))
    weights = [0.5, -2.0]

    scaled = [Undone.by(adapter, subspace).times(weight) for adapter, weight in zip((one, two), weights, strict=True)]

    combined = Undone.by(csulora.combine([one, two], subspace, weights), subspace)
    sums = {name: sum(member.shares.get(name, 0.0) for member in scaled) for name in MODULES}
    assert sums == pytest.approx(dict(combined.shares), rel=1e-4)


def test_two_within_the_limit_whose_sum_is_beyond_it_are_refused(subspace: csulora.Subspace, tmp_path: Path) -> None:
    policy = csulora.Policy.none(max_undo=0.5)
    paths = [factories.opposing_adapter(tmp_path / name, subspace, MODULES, 0.3) for name in ("one", "two")]
    members = [Undone.by(csulora.correct(csulora.load_adapter(path), subspace, policy)[0], subspace) for path in paths]

    for member in members:
        check_together([member], policy)
    with pytest.raises(UndoTogetherError, match=r"one \+ two: undo 0\.600 of .*; the policy allows 0\.5"):
        check_together(members, policy)
    check_together([member.times(0.8) for member in members], policy)
    check_together(members, replace(policy, max_undo=None))


def test_what_the_policy_takes_away_does_not_count(subspace: csulora.Subspace, tmp_path: Path) -> None:
    policy = csulora.Policy(math.inf, 0.0, 0.0, max_undo=0.5)
    path = factories.opposing_adapter(tmp_path / "one", subspace, MODULES, 0.4)
    corrected, _ = csulora.correct(csulora.load_adapter(path), subspace, policy)

    check_together([Undone.by(corrected, subspace)] * 3, policy)


def test_one_that_reinforces_does_not_make_room_for_another(subspace: csulora.Subspace, tmp_path: Path) -> None:
    """A host may leave it out."""
    policy = csulora.Policy.none(max_undo=0.5)
    shares = {"against": 0.45, "too": 0.3, "for": -0.4}
    against, too, reinforcing = (
        Undone.by(csulora.load_adapter(factories.opposing_adapter(tmp_path / name, subspace, MODULES, share)), subspace)
        for name, share in shares.items()
    )

    check_together([against, too, reinforcing], policy)
    with pytest.raises(UndoTogetherError):
        check_together([against, too, reinforcing], policy, any_of_them=True)


def test_total_undo_of_a_sum_is_limited_too(subspace: csulora.Subspace, tmp_path: Path) -> None:
    """As it is of the combined adapter; of any of them, also where those left have fewer modules."""
    paths = [factories.opposing_adapter(tmp_path / "one", subspace, MODULES, 0.1)]
    paths += [factories.opposing_adapter(tmp_path / "two", subspace, {NAME: (48, 48)}, 0.4)]
    adapters = [csulora.load_adapter(path) for path in paths]
    members = [Undone.by(adapter, subspace) for adapter in adapters]
    _, report = csulora.correct(csulora.combine(adapters, subspace), subspace, csulora.Policy.none())
    total = report.totals.undo

    check_together(members, csulora.Policy.none(max_total_undo=total + 0.001))
    with pytest.raises(UndoTogetherError, match=f"undo {total:.3f} of the alignment of all modules together"):
        check_together(members, csulora.Policy.none(max_total_undo=total - 0.001))
    with pytest.raises(UndoTogetherError, match=r"undo 0\.500 of the alignment of all"):
        check_together(members, csulora.Policy.none(max_total_undo=0.45), any_of_them=True)


def test_modules_that_alignment_did_not_move_have_nothing_to_undo(tmp_path: Path) -> None:
    unmoved = factories.subspace({NAME: (48, 48)}, rank=0)
    members = [Undone.by(csulora.load_adapter(factories.save_adapter(tmp_path / "any", {NAME: (48, 48)})), unmoved)] * 2
    assert members[0].total == 0
    for any_of_them in (False, True):
        check_together(members, csulora.Policy.none(max_undo=0.1, max_total_undo=0.1), any_of_them=any_of_them)
