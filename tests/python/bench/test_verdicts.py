"""bench/efficacy/verdicts.py: areas and thresholds of made-up points, and adapters that nobody trains."""

import pytest
import torch

import factories
from csulora.correction.annihilation import annihilation_ratio

pytest.importorskip("peft")

import abliteration
import verdicts


def points(seed: int, kind: str, *undos: float) -> list[verdicts.Record]:
    figures = {"largest_undo": 0.0, "canary_undo": None, "annihilation_ratio": 1.0}
    return [{"seed": seed, "kind": kind, "undo": undo, **figures} for undo in undos]


def test_areas_count_pairs_and_thresholds_are_chosen_on_even_seeds() -> None:
    found = [
        *points(0, verdicts.HARMLESS, 0.1, 0.3),
        *points(1, verdicts.HARMLESS, 0.2, 0.4),
        *points(0, verdicts.PURE, 0.9),
        *points(1, verdicts.PURE, 0.35, 0.25),
    ]
    total = verdicts.summary(found)["total undo"]
    assert total["area"][verdicts.PURE] == pytest.approx((4 + 3 + 2) / 12)
    assert total["area"][verdicts.FEW] is None
    assert (total["threshold"]["threshold"], total["threshold"]["chosen_on"]) == (0.3, 2)
    assert total["threshold"]["tried"][verdicts.PURE] == {"found": 1, "of": 2}
    assert total["threshold"]["tried"][verdicts.HARMLESS] == {"found": 1, "of": 2}
    assert verdicts.summary(found)["undo of the canary"]["threshold"] is None


def test_removals_and_overwritten_directions_have_the_ratios_that_are_meant() -> None:
    weights = {"o_proj": factories.gaussian(20, 30, seed=1)}
    u = factories.orthonormal(20, 1, 2).float()[:, 0]
    for share, ratio in ((1.0, 0.0), (0.5, 0.25), (2.0, 1.0)):
        (module,) = abliteration.removed(weights, u, share).modules.values()
        assert annihilation_ratio(weights["o_proj"], module) == pytest.approx(ratio, abs=1e-6)
    (module,) = abliteration.overwritten(weights, u).modules.values()
    assert annihilation_ratio(weights["o_proj"], module) == pytest.approx(1, rel=1e-5)
    after = u @ (weights["o_proj"] + module.b @ module.a)
    assert abs(float(torch.cosine_similarity(after, u @ weights["o_proj"], dim=0))) < 0.7
