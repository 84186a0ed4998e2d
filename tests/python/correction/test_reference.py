"""Where an adapter stands among an operator's own."""

from pathlib import Path

import pytest

import csulora
import tiny_model
from csulora.correction.reference import Reference, percentile
from csulora.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    place = tiny_model.build(tmp_path_factory.mktemp("place"))
    trusted = place.aligned.with_name("trusted")
    trusted.mkdir()
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    for factor in (0.25, 0.5, 0.75):
        csulora.save_adapter(csulora.controls.scaling(adapter, subspace, factor)[0], trusted / f"x{factor}")
    (trusted / "broken").mkdir()
    (trusted / "notes.txt").write_text("no adapter")
    return place


def test_percentiles_count_what_is_smaller(place: tiny_model.Place) -> None:
    subspace = csulora.Subspace.open(place.subspace)
    reference = Reference.read(place.aligned.with_name("trusted"), subspace, place.aligned)
    assert len(reference.reports) == 3
    assert list(reference.skipped) == ["broken"]
    adapter = csulora.load_adapter(place.adapters[0])
    between, _ = csulora.controls.scaling(adapter, subspace, 0.6)
    _, report = csulora.correct(between, subspace, csulora.Policy.none(), aligned=place.aligned)
    standings = {each.figure: each for each in reference.standings(report)}
    assert set(standings) == {"undo", "largest_undo", "annihilation_ratio"}
    assert standings["undo"].percentile == pytest.approx(100 * 2 / 3)
    assert standings["undo"].value == pytest.approx(0.6, rel=0.2)
    _, without = csulora.correct(between, subspace, csulora.Policy.none())
    assert [each.figure for each in reference.standings(without)] == ["undo", "largest_undo"]
    own = reference.reports[1]
    assert len(reference.others(own)) == 2  # an adapter is not its own reference


def test_ties_count_half() -> None:
    assert percentile(1.0, [1.0, 1.0]) == 50
    assert percentile(2.0, [1.0]) == 100


def test_a_folder_without_adapters_is_told(place: tiny_model.Place, tmp_path: Path) -> None:
    subspace = csulora.Subspace.open(place.subspace)
    with pytest.raises(InputError, match="no such folder"):
        Reference.read(tmp_path / "none", subspace)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"holds no adapter that can be measured; give each adapter a folder in it; .*empty"
    ):
        Reference.read(tmp_path, subspace)
