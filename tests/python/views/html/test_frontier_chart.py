from csulora.tuning.frontier import Frontier, Point, Rate
from csulora.views.html.frontier_chart import FrontierChart


def point(policy: str, safety: int, task: int) -> Point:
    return Point("presets", policy, False, Rate.of(safety, 100), Rate.of(task, 100), 0.1)


def labels(*points: Point) -> list[str]:
    frontier = Frontier("0" * 64, ("adapter",), points, None, points[0].policy, "verdict")
    return [mark.label for mark in FrontierChart.of(frontier).marks]


def test_marks_apart_have_a_label_each() -> None:
    assert labels(point("a", 90, 90), point("b", 50, 60), point("c", 10, 90)) == ["1", "2", "3"]


def test_marks_together_share_the_first_ones_label() -> None:
    assert labels(point("a", 90, 90), point("b", 89, 90), point("c", 50, 50)) == ["1, 2", "", "3"]


def test_label_of_many_is_cut() -> None:
    assert labels(*(point(policy, 70, 70) for policy in "abcde")) == ["1, 2, 3 …", "", "", "", ""]
