"""McNemar's exact test beside a count of every outcome, and outcomes by hand."""

import itertools

import pytest

from csulora.evaluation.outcomes import Tally, Yardstick, perplexity_limit
from csulora.evaluation.replies import Said
from csulora.evaluation.statistics import Paired


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 7)])
def test_p_is_the_share_of_splits_that_are_as_uneven(better: int, worse: int) -> None:
    first = [True] * better + [False] * worse + [True, False]
    second = [False] * better + [True] * worse + [True, False]
    splits = list(itertools.product([0, 1], repeat=better + worse))
    uneven = sum(abs(2 * sum(split) - len(split)) >= abs(better - worse) for split in splits)
    found = Paired.of(first, second)
    assert found.p == pytest.approx(uneven / len(splits))
    assert (found.better, found.worse, found.count) == (better, worse, better + worse + 2)
    assert found.difference == pytest.approx((better - worse) / (better + worse + 2))


def test_p_of_very_many_prompts_is_finite() -> None:
    assert Paired.of([True] * 5000, [False] * 5000).p == 0
    assert Paired.of([True] * 900, [False] * 900).p < 1e-200


def test_outcomes_are_told_apart() -> None:
    model, raw = [Said((1, 2), "sorry", 1.5)] * 3, [Said((7,), "go", 3.0)] * 3
    judge = Yardstick((model, raw), perplexity_limit([model, raw], 10.0), ("Sorry",))
    assert judge.limit == pytest.approx(30)
    replies = [Said((1, 2), "Sorry, no", 1.5), Said((7,), "go", 30.0), Said((9,), "sorry sorry", 30.1)]
    same, answered, incoherent = judge.outcomes(replies)
    assert (same.same, same.refused, same.incoherent) == (True, True, False)
    assert (answered.same, answered.refused, answered.incoherent) == (True, False, False)
    assert (incoherent.same, incoherent.refused, incoherent.incoherent) == (False, False, True)
    tally = Tally.of([same, answered, incoherent])
    assert (tally.same.value, tally.incoherent.value, tally.perplexity) == (2 / 3, 1 / 3, 30.0)
    assert tally.refused is not None
    assert tally.refused.value == 1 / 3
