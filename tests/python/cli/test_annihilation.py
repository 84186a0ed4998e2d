"""`--aligned-model` and `--reference` of inspect and correct."""

import json
from pathlib import Path

import pytest

import tiny_model
from commands import Run
from csulora.cli import exit_codes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


def test_inspect_says_the_ratio_or_that_it_is_absent(run: Run, place: tiny_model.Place, tmp_path: Path) -> None:
    command = f"inspect {place.adapters[0]} --subspace {place.subspace}"
    assert "annihilation ratio: absent" in run(command).out
    reference = f"--aligned-model {place.aligned} --reference {place.adapters[0].parent}"
    outcome = run(f"{command} {reference} --json {tmp_path / 'report.json'}")
    assert outcome.code == 0, outcome.err
    document = json.loads((tmp_path / "report.json").read_text())
    assert f"annihilation ratio: {document['totals']['annihilation_ratio']:.2g} in model" in outcome.out
    assert document["reference"]["count"] == 1  # the other adapter; models are skipped
    assert "of 1 reference adapters" in outcome.out
    assert run(f"inspect {place.adapters[0]} --reference {tmp_path}").code == 2


def test_limits_refuse(run: Run, place: tiny_model.Place, tmp_path: Path) -> None:
    command = f"correct {place.adapters[0]} --subspace {place.subspace} --policy none -o {tmp_path / 'out'}"
    unknown = run(f"{command} --min-annihilation-ratio 0.05")
    assert (unknown.code, "--aligned-model" in unknown.err) == (exit_codes.REFUSED, True)
    refused = run(f"{command} --min-annihilation-ratio 1e9 --aligned-model {place.aligned}")
    assert (refused.code, "removes a direction" in refused.err) == (exit_codes.REFUSED, True)
    total = run(f"{command} --max-total-undo 0.5")
    assert (total.code, "all modules together undo" in total.err) == (exit_codes.REFUSED, True)
    assert run(f"{command} --max-total-undo 2 --min-annihilation-ratio 0 --aligned-model {place.aligned}").code == 0
    assert run(f"{command} --max-total-undo nan").code == 2
