"""`csulora guard` and `csulora verify --decision` as commands; what the guard does is tested in serving."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import csulora
import factories
from commands import Run

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(autouse=True)
def _signals_are_put_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    csulora.extract(*factories.model_pair(tmp_path), rank=4, output=tmp_path / "s.safetensors")
    factories.save_adapter(tmp_path / "in" / "good", MODULES)
    factories.save_adapter(tmp_path / "in" / "dora", MODULES, use_dora=True)
    return tmp_path


GUARD = "guard in out --subspace s.safetensors --settle 0 --patience 0"


def test_a_summary_ends_it_and_refusals_may_fail_it(place: Path, run: Run) -> None:
    done = run(f"{GUARD} --policy csulora")
    assert (done.code, done.out.splitlines()[-1]) == (0, "1 corrected, 1 refused")
    done = run(f"{GUARD} --policy csulora --fail-on-refusal --quiet")
    assert (done.code, done.out) == (3, "")
    assert "1 uploads are not let through: dora; out/NAME.refused.json says why" in done.err
    assert run(f"{GUARD} --policy csulora --fail-on-refusal --watch").code == 2


def test_a_plan_is_a_table_or_a_document(place: Path, run: Run) -> None:
    done = run(f"{GUARD} --policy csulora --plan")
    assert "nothing -> corrected" in done.out
    assert "dora: not-plain-lora: " in done.out
    assert done.out.splitlines()[-1] == "it would be: 1 corrected, 1 refused; 2 of 2 differ from now"
    done = run(f"{GUARD} --policy csulora --plan --json -")
    assert [row["verdict"] for row in json.loads(done.out)["uploads"]] == ["refused", "corrected"]
    assert not Path("out").exists()
    failed = run(f"{GUARD} --policy csulora --plan --fail-on-refusal --quiet")
    assert (failed.code, failed.err) == (3, "csulora: refused: 1 uploads would not be let through: dora\n")
    assert run(f"{GUARD} --policy csulora --plan --watch").code == 2
    assert run(f"{GUARD} --policy csulora --plan --together *").code == 4  # no limit for sums
    assert run(f"{GUARD} --policy csulora --json x.json").code == 2


def test_a_decision_is_verified_by_its_id(place: Path, run: Run) -> None:
    run(f"{GUARD} --policy csulora --decisions log.jsonl")
    refused, corrected = map(json.loads, Path("log.jsonl").read_text().splitlines())

    done = run(f"verify --decision {corrected['id'][:8]} log.jsonl")
    assert done.out.splitlines()[-1] == f"decision {corrected['id']}, corrected: was made again, bit by bit"
    done = run("verify --decision last log.jsonl --json -")
    assert len(json.loads(done.out)["checks"]) == 12
    assert run(f"verify --decision {refused['id']} log.jsonl").code == 0
    Path("in").rename("moved")
    done = run("verify --decision last log.jsonl")
    assert (done.code, done.err.endswith("is found; name the original of then after LOG\n")) == (3, True)
    assert run("verify --decision last log.jsonl moved/good").code == 0


def test_what_a_decision_does_not_take_is_not_taken(place: Path, run: Run) -> None:
    done = run("verify --decision last log.jsonl --require-signature some.pub")
    assert (done.code, "takes all of that from the line" in done.err) == (2, True)


@pytest.mark.parametrize("option", ["--decisions in/good/adapter_config.json", "--health out/health"])
def test_nothing_else_is_written_where_adapters_lie(option: str, place: Path, run: Run) -> None:
    before = (place / "in/good/adapter_config.json").read_bytes()
    done = run(f"{GUARD} --policy csulora {option}")
    assert (done.code, "which holds adapters alone; choose another place" in done.err) == (4, True)
    assert (place / "in/good/adapter_config.json").read_bytes() == before


def test_a_policy_that_stands_in_the_line_takes_no_other(place: Path, run: Run) -> None:
    run(f"{GUARD} --policy csulora --decisions log.jsonl")
    done = run("verify --decision last log.jsonl --policy project")
    assert (done.code, "its policy stands in the line; name no other" in done.err) == (4, True)
