"""bench/stress/load.py in small: results of threads and processes are the serial ones, bit for bit."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import csulora


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "bench" / "stress")
    return importlib.import_module("load")


def test_threads_make_what_one_thread_makes(load: ModuleType, tmp_path: Path, one_thread: None) -> None:
    subspace, adapters = load.make_inputs(tmp_path)
    opened = csulora.Subspace.open(subspace)
    expected = {adapter: load.corrected_sha256(adapter, opened) for adapter in adapters}
    del opened
    assert len(set(expected.values())) == len(adapters)
    outcome = load.hammer(subspace, adapters, expected, threads=16, seconds=3)
    assert outcome.corrections > 16
    assert outcome.wrong == 0
    assert outcome.mappings_of_the_subspace_file == 1
