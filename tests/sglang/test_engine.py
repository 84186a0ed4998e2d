"""Every way into SGLang's engine: corrected as `csulora correct` corrects, or refused with the reason.

The engine holds two adapters at a time, so that loading a third evicts one, which a later request loads again.
"""

from types import SimpleNamespace

import pytest
from answers import assert_same, assert_unlike


def test_base_model_answers_as_ever(plain: dict, guarded: dict) -> None:
    assert_same(guarded["base"], plain["base"])
    assert_same(guarded["base after"], plain["base"])


@pytest.mark.parametrize(
    ("answer", "adapter"),
    [
        ("static", "one"),
        ("two", "two"),
        ("third", "one"),
        ("static after eviction", "one"),
        ("two after eviction", "two"),
    ],
)
def test_adapters_are_corrected(answer: str, adapter: str, plain: dict, guarded: dict) -> None:
    assert_same(guarded[answer], plain[f"corrected-{adapter}"])
    assert_unlike(guarded[answer], plain[f"raw-{adapter}"])


def test_what_cannot_be_corrected_is_refused_with_the_reason(guarded: dict, files: SimpleNamespace) -> None:
    for name, reason in files.reasons.items():
        assert guarded["refused"][name].startswith("csulora: ")
        assert reason in guarded["refused"][name]
    assert guarded["missing"].startswith("csulora: /nowhere: ")


def test_tensors_are_refused(guarded: dict) -> None:
    assert "csulora: tensors: adapters are loaded from a directory or hub id" in guarded["tensors"]


def test_a_schedulers_own_procedures_load_nothing_that_was_not_published(guarded: dict) -> None:
    assert "one: came by a way on which csulora did not check it; nothing was loaded" in guarded["log"]
    assert "never been loaded: rpc" in guarded["after rpc"]
