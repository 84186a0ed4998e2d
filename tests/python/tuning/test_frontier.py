import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora.errors import InputError
from csulora.tuning.frontier import Frontier, Point, Rate, Refusals, frontier_path

FRONTIER = Frontier(
    subspace_sha256="ab" * 32,
    adapters=("one", "two"),
    points=(
        Point("tuned", "tuned", False, Rate.of(7, 8), Rate.of(8, 8), 0.4),
        Point("scaling", "x0.5", True, Rate.of(0, 8), Rate.of(3, 8), 0.5),
    ),
    recommended="tuned",
    written="tuned",
    verdict="tuned it is",
)


@given(count=st.integers(1, 500), share=st.floats(0, 1))
def test_an_interval_holds_its_share(count: int, share: float) -> None:
    rate = Rate.of(round(share * count), count)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_an_interval_is_wilsons() -> None:
    rate = Rate.of(5, 20)  # worked by hand from the formula: centre 0.29029, half width 0.17843
    assert (rate.low, rate.high) == pytest.approx((0.11186, 0.46872), abs=5e-5)


def test_what_is_kept_at_least_is_no_surer_than_the_least_sure_of_its_shares() -> None:
    point = Point("tuned", "tuned", False, Rate.of(10, 10), Rate.of(2, 2), 0.4, general=Rate.of(19, 20))
    assert (point.score, point.least.low, point.least.high) == (0.95, Rate.of(2, 2).low, Rate.of(19, 20).high)
    assert point.least.count == 2


def test_a_frontier_survives_its_file(tmp_path: Path) -> None:
    path = frontier_path(tmp_path / "policy.toml")
    FRONTIER.save(path)
    assert path.name == "policy.frontier.json"
    assert Frontier.load(path) == FRONTIER


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        ({"refusals": Refusals(Rate.of(7, 8), Rate.of(1, 8))}, "counts_refusals"),
        ({"general": Rate.of(5, 8)}, "has_general"),
    ],
)
def test_what_need_not_be_measured_survives_the_file_and_shows_if_every_point_has_it(
    tmp_path: Path, extra: dict[str, Any], shown: str
) -> None:
    path, (first, second) = tmp_path / "frontier.json", FRONTIER.points
    one = replace(FRONTIER, points=(replace(first, **extra), second))
    every = replace(FRONTIER, points=(replace(first, **extra), replace(second, **extra)))
    for frontier, shows in ((FRONTIER, False), (one, False), (every, True)):
        frontier.save(path)
        assert Frontier.load(path) == frontier
        assert getattr(frontier, shown) is shows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("points", None),
        ("points", [{}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"relative_change": -1.0}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"relative_change": 10**400}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"control": 1}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"family": 1}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"refusals": {"safety": None, "task": None}}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"refusals": 0.5}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"general": 0.5}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"safety": {"value": 2, "low": 0, "high": 1, "count": 1}}]),
        ("points", [FRONTIER.to_dict()["points"][0] | {"safety": {"value": 0.5, "low": 0, "high": 1, "count": 1.5}}]),
        ("format", 1),
        ("verdict", 3),
        ("adapters", [1]),
        ("more", 1),
    ],
)
def test_a_damaged_frontier_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(FRONTIER.to_dict() | {key: value}))
    with pytest.raises(InputError, match="frontier"):
        Frontier.load(path)
