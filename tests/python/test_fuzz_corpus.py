"""Inputs that the fuzzer found interesting, or that csulora once did wrong: accepted, or refused with a clear error."""

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

import targets  # noqa: E402 - lies beside the fuzzer

CORPUS = FUZZ / "corpus"
INPUTS = sorted(str(path.relative_to(CORPUS)) for path in CORPUS.glob("*/*"))
GOOD = {f"{target}/{name}" for target, files in targets.seeds().items() for name in files}
# A base model; the modules of the configuration beside it; who ordered the columns.
NEEDS_MORE = {"gguf/llama", "safetensors/file", "experts_config/unsloth"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", INPUTS)
def test_input_is_accepted_or_refused(name: str) -> None:
    accepted = targets.survives(name.partition("/")[0], (CORPUS / name).read_bytes())
    if name in GOOD:
        assert accepted == (name not in NEEDS_MORE)


def test_good_files_of_every_kind_are_in_the_corpus() -> None:
    assert set(INPUTS) >= GOOD
    assert {name.partition("/")[0] for name in INPUTS} == set(targets.TARGETS)
