import dataclasses
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import csulora
import factories
from csulora.adapters.lora import has_same_bits
from csulora.adapters.peft import directory as peft
from csulora.errors import NotAdjustedError
from csulora.policy.overrides import Directions, Override
from csulora.serving.gate import Gate
from csulora.subspace.input_filter import InputFilter

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


def test_admits_what_correct_returns(subspace: Path, tmp_path: Path) -> None:
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    gate = Gate.open(subspace, "csulora")

    with gate.decision(path) as decision:
        admitted, report = decision.correct(decision.read(path))
        with decision.private_directory(admitted) as directory:
            reread = peft.read(directory)

    expected, expected_report = csulora.correct(
        csulora.load_adapter(path), csulora.Subspace.open(subspace), csulora.Policy.csulora()
    )
    assert report == expected_report
    assert reread.modules.keys() == expected.modules.keys()
    assert all((reread.modules[name].b == module.b).all() for name, module in expected.modules.items())
    assert not directory.exists()


def test_fingerprint_changes_with_the_policy_alone(subspace: Path) -> None:
    one, same, other = (
        Gate.open(subspace, "csulora"),
        Gate.open(subspace, "csulora"),
        Gate.open(subspace, csulora.Policy.project()),
    )

    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_decisions_are_never_appended_to_what_they_follow_from(subspace: Path, tmp_path: Path) -> None:
    csulora.Policy.project().save(tmp_path / "policy.toml")
    for file in (subspace, tmp_path / "policy.toml"):
        before = file.read_bytes()
        with pytest.raises(csulora.InputError, match=file.name):
            Gate.open(subspace, tmp_path / "policy.toml", file)
        assert file.read_bytes() == before
    Gate.open(subspace, "project", tmp_path / "project")


def test_environment_names_everything(subspace: Path, tmp_path: Path) -> None:
    csulora.Policy.project().save(tmp_path / "policy.toml")
    variables = {
        "CSULORA_SUBSPACE": str(subspace),
        "CSULORA_POLICY": str(tmp_path / "policy.toml"),
        "CSULORA_DECISIONS": str(tmp_path / "log.jsonl"),
    }

    gate = Gate.from_environment(variables)

    assert gate.policy == csulora.Policy.project()
    assert gate.log.path == tmp_path / "log.jsonl"
    with pytest.raises(csulora.InputError, match=r"CSULORA_POLICY is not set \(--policy\); choose a preset"):
        Gate.from_environment({"CSULORA_SUBSPACE": str(subspace), "CSULORA_POLICY": ""})
    with pytest.raises(csulora.InputError, match=r"policy is missing; .*choose a preset"):
        Gate.open(subspace)
    with pytest.raises(csulora.InputError, match="CSULORA_SUBSPACE"):
        Gate.from_environment({})


def test_policy_tuned_for_another_subspace_is_refused_at_once(subspace: Path) -> None:
    with pytest.raises(csulora.RefusedError, match="tuned for"):
        Gate.open(subspace, csulora.Policy(subspace_sha256="0" * 64))


REMOVING = Override("*", directions=Directions((0.0,), (0.0,)))


def with_input_filters(subspace: Path, path: Path, entry: float) -> Path:
    opened = csulora.Subspace.open(subspace)
    input_filters = {
        name: InputFilter(torch.full((n, 1), entry), torch.full((n, 1), 1 / n)) for name, (_, n) in MODULES.items()
    }
    opened.with_input_filters(input_filters).save(path)
    return path


def test_a_filtered_policy_is_admitted_from_files_as_correct_returns_it(subspace: Path, tmp_path: Path) -> None:
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    filtered = with_input_filters(subspace, tmp_path / "subspace", 0.5)
    policy = csulora.Policy.none(overrides=(REMOVING,), filtered=True)
    policy.save(tmp_path / "policy.toml")

    with Gate.open(filtered, tmp_path / "policy.toml").decision(path) as decision:
        admitted, report = decision.correct(decision.read(path))

    expected, expected_report = csulora.correct(csulora.load_adapter(path), csulora.Subspace.open(filtered), policy)
    assert report == expected_report
    assert all((admitted.modules[name].a == module.a).all() for name, module in expected.modules.items())
    unfiltered = dataclasses.replace(policy, filtered=False)
    everywhere, _ = csulora.correct(csulora.load_adapter(path), csulora.Subspace.open(filtered), unfiltered)
    assert any((everywhere.modules[name].a != module.a).any() for name, module in expected.modules.items())


def test_what_a_filtered_policy_needs_is_checked_at_once(subspace: Path, tmp_path: Path) -> None:
    policy = csulora.Policy.none(overrides=(REMOVING,), filtered=True)
    with pytest.raises(csulora.InputError, match="the subspace file has no input filters"):
        Gate.open(subspace, policy)
    with pytest.raises(csulora.InputError, match="the input filter holds NaN or infinity"):
        Gate.open(with_input_filters(subspace, tmp_path / "subspace", math.inf), policy)
    with pytest.raises(csulora.InputError, match=r"only gains of directions can be, and model\..* has none"):
        Gate.open(with_input_filters(subspace, tmp_path / "subspace", 0.5), csulora.Policy.protect(filtered=True))


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_decision_spans_reading_and_delivery(subspace: Path, tmp_path: Path) -> None:
    path, log = factories.save_adapter(tmp_path / "adapter", MODULES), tmp_path / "log.jsonl"

    with Gate.open(subspace, "csulora", log).decision(path) as decision:
        decision.correct(decision.read(path))
        assert not lines(log)
        time.sleep(0.2)

    (line,) = lines(log)
    assert line["verdict"] == "corrected"
    assert line["adapter_sha256"] == csulora.load_adapter(path).sha256
    assert float(str(line["seconds"])) > 0.2


def test_each_adapter_is_corrected_with_its_own_strength_and_others_are_refused(subspace: Path, tmp_path: Path) -> None:
    log, directions = tmp_path / "log.jsonl", Directions((0.5,), (0.5,), (2.0,))
    listed, other = (factories.save_adapter(tmp_path / name, MODULES, seed=seed) for seed, name in enumerate("ab"))
    alike = csulora.Policy.none(overrides=(Override("*", directions=directions),))
    gate = Gate.open(subspace, alike.with_strength(csulora.load_adapter(listed).sha256, 0.25), log)

    with gate.decision(listed) as decision:
        corrected, report = decision.correct(decision.read(listed))
    with (
        pytest.raises(NotAdjustedError, match="b: the policy has strengths for other adapters, and none for this one"),
        gate.decision(other) as decision,
    ):
        decision.correct(decision.read(other))

    opened = csulora.Subspace.open(subspace)
    expected, expected_report = csulora.correct(csulora.load_adapter(listed), opened, alike.strengthened(0.25))
    assert report == expected_report
    assert all(has_same_bits(corrected.modules[name].b, module.b) for name, module in expected.modules.items())
    assert [line["reason_code"] for line in lines(log)] == [None, "not-adjusted"]


def test_what_fails_after_the_correction_was_not_let_through(subspace: Path, tmp_path: Path) -> None:
    path, log = factories.save_adapter(tmp_path / "adapter", MODULES), tmp_path / "log.jsonl"

    def delivered(error: BaseException) -> None:
        with Gate.open(subspace, "csulora", log).decision(path) as decision:
            decision.correct(decision.read(path))
            raise error

    with pytest.raises(OSError, match="full"):
        delivered(OSError("the disk is full"))

    (line,) = lines(log)
    assert (line["verdict"], line["reason"], line["totals"]) == ("failed", "the disk is full", None)
    assert line["adapter_sha256"] == csulora.load_adapter(path).sha256


def test_an_interrupted_block_has_decided_nothing(subspace: Path, tmp_path: Path) -> None:
    path, log = factories.save_adapter(tmp_path / "adapter", MODULES), tmp_path / "log.jsonl"
    gate = Gate.open(subspace, "csulora", log)

    with suppress(KeyboardInterrupt), gate.decision(path) as decision:
        decision.correct(decision.read(path))
        raise KeyboardInterrupt
    with gate.decision(path) as decision:
        decision.read(path)

    assert not lines(log)


def test_a_recalled_adapter_is_recorded_without_totals(subspace: Path, tmp_path: Path) -> None:
    path, log = factories.save_adapter(tmp_path / "adapter", MODULES), tmp_path / "log.jsonl"

    with Gate.open(subspace, "csulora", log).decision(path) as decision:
        decision.read(path)
        decision.recall({"adapter_model.safetensors": "0" * 64})

    (line,) = lines(log)
    assert (line["verdict"], line["totals"]) == ("corrected", None)
