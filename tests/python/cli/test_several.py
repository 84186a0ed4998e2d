"""`csulora correct` with several adapters."""

import json
from pathlib import Path
from typing import NoReturn

import pytest
import typer

import csulora
import factories
from commands import Run
from csulora.cli import exit_codes
from csulora.cli.several import correct_several
from csulora.errors import CsuloraError, InputError, RefusedError

pytestmark = pytest.mark.usefixtures("one_thread")

CORRECT = ("--subspace", "subspace", "--policy", "csulora", "-o", "out")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a subspace file, two adapters and a broken one."""
    monkeypatch.chdir(tmp_path)
    factories.model_pair(tmp_path)
    csulora.extract("base", "aligned", rank=6).save("subspace")
    for name in ("one", "two"):
        factories.save_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": (48, 48)})
    Path("bad").mkdir()
    Path("bad/adapter_config.json").write_text("{")
    return tmp_path


def test_each_is_corrected_as_it_is_alone(work: Path, run: Run) -> None:
    result = run("correct", "one", "two", *CORRECT)
    assert result.code == 0
    assert len(result.out.splitlines()) == 2
    assert run("correct", "two", *CORRECT[:-1], "alone").code == 0
    weights = "adapter_model.safetensors"
    assert (work / "out" / "two" / weights).read_bytes() == (work / "alone" / weights).read_bytes()


def test_figures_that_would_take_the_directory_s_place_are_refused_before_the_work(work: Path, run: Run) -> None:
    result = run("correct", "one", "two", *CORRECT, "--json", "./out")
    assert result.code == 2
    assert not (work / "out").exists()


@pytest.mark.parametrize("adapters", [["one"], ["one", "two"]])
@pytest.mark.parametrize("output", ["one", "one/below", "one/deep/below", "two/../one"])
def test_nothing_is_written_into_an_adapter(work: Path, run: Run, adapters: list[str], output: str) -> None:
    before = sorted((work / "one").iterdir())
    result = run("correct", *adapters, *CORRECT[:-1], output)
    assert (result.code, "lies in what is read" in result.err) == (exit_codes.BAD_INPUT, True)
    assert sorted((work / "one").iterdir()) == before


def test_figures_never_lie_in_an_adapter_that_is_written(work: Path, run: Run) -> None:
    (work / "out" / "one").mkdir(parents=True)
    result = run("correct", "one", "two", *CORRECT, "--json", "out/one/adapter_config.json")
    assert (result.code, "lies in what is written" in result.err) == (exit_codes.BAD_INPUT, True)
    assert not list((work / "out" / "one").iterdir())


def test_one_that_fails_stops_no_other(work: Path, run: Run) -> None:
    result = run("correct", "one", "bad", "two", *CORRECT, "--json", "figures.json")
    assert result.code == exit_codes.BAD_INPUT
    assert result.err.startswith("csulora: error: bad: ")
    assert len(result.err.splitlines()) == 1
    assert sorted(path.name for path in (work / "out").iterdir()) == ["one", "two"]
    entries = json.loads((work / "figures.json").read_text())["adapters"]
    assert sorted(entries) == ["bad", "one", "two"]
    assert "error" in entries["bad"]
    assert entries["one"]["totals"]["undo_after"] == pytest.approx(entries["two"]["totals"]["undo_after"])


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([RefusedError("rule")], exit_codes.REFUSED),
        ([RefusedError("rule"), InputError("file")], exit_codes.BAD_INPUT),
    ],
)
def test_the_exit_code_is_that_of_the_worst(tmp_path: Path, errors: list[CsuloraError], code: int) -> None:
    targets = {f"{i}": tmp_path / "out" / f"{i}" for i in range(len(errors))}

    def fail(adapter: str, path: Path) -> NoReturn:
        raise errors[int(adapter)]

    with pytest.raises(typer.Exit) as raised:
        correct_several(targets, fail, None, quiet=True)
    assert raised.value.exit_code == code


def test_an_output_never_leaves_the_directory(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "one" / "below").mkdir()
    monkeypatch.chdir(work / "one" / "below")
    result = run("correct", "../../two", "..", "--subspace", work / "subspace", *CORRECT[2:-1], work / "out")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in (work / "out").iterdir()) == ["one", "two"]


def test_a_parent_that_is_not_there_is_named(run: Run, work: Path) -> None:
    result = run("correct", "one", "two", *CORRECT[:-1], "absent/out")
    assert (result.code, "no such directory; create it first" in result.err) == (exit_codes.BAD_INPUT, True)


@pytest.mark.parametrize(("further", "reason"), [("./one", "rename one"), ("two", "is a file")])
def test_usage_errors_come_before_any_work(work: Path, run: Run, further: str, reason: str) -> None:
    output = "out.gguf" if reason == "is a file" else "out"
    result = run("correct", "one", further, *CORRECT[:-1], output)
    assert result.code == 2
    assert reason in result.err
    assert not (work / "out").exists()
