"""Files for operators name only what exists: metrics, labels, reasons, options; systemd accepts the unit."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

import factories
from csulora.serving import metrics
from csulora.serving.decisions import Form

EXAMPLES = Path(__file__).parents[3] / "examples"
_NAME = re.compile(r"\bcsulora_\w+")
_LABELLED = re.compile(r"\b(csulora_\w+)\{([^}]*)\}")
_LABEL = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Every series that csulora exposes, with its labels."""
    totals = {"largest_undo": 0.5, "largest_undo_after": 0.1, "undo": 0.2, "undo_after": 0.1}
    totals |= {"annihilation_ratio": 0.4, "annihilation_ratio_after": None}
    totals |= {"relative_change": 0.2, "uncorrected": 0.0}
    done = {"verdict": "corrected", "reason": None, "reason_code": None, "totals": totals, "form": Form()}
    metrics.observe(factories.decision().to_dict())
    metrics.observe(factories.decision(**done).to_dict())
    found = metrics.of_guard()
    assert found is not None
    found.undecided.set(0)
    found.reloads.labels(result="done").inc()
    samples = [sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples if sample.name.startswith("csulora_")}


def expressions() -> dict[str, str]:
    dashboard = json.loads((EXAMPLES / "monitoring" / "dashboard.json").read_text())
    found = {
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    rules: dict[str, Any] = yaml.safe_load((EXAMPLES / "monitoring" / "alerts.yml").read_text())
    return found | {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


@pytest.mark.parametrize("where", expressions())
def test_only_metrics_and_labels_that_exist(where: str, exposed: dict[str, set[str]]) -> None:
    expression = expressions()[where]
    assert set(_NAME.findall(expression)) <= exposed.keys()
    for name, labels in _LABELLED.findall(expression):
        assert {label for label, _, _ in _LABEL.findall(labels)} <= exposed[name]
    for label, operator, value in _LABEL.findall(expression):
        if label == "verdict" and operator in ("=", "=~"):
            assert set(value.split("|")) <= {"corrected", "refused", "invalid", "failed", "withdrawn"}


def test_every_metric_is_counted_as_it_is_named(exposed: dict[str, set[str]]) -> None:
    families = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in exposed}
    page = (EXAMPLES.parent / "docs" / "pages" / "operating.md").read_text()
    assert all(family in page for family in families)
    assert exposed["csulora_decisions_total"] == {"verdict", "reason", "route"}


def unit_options() -> list[str]:
    unit = (EXAMPLES / "systemd" / "csulora-guard.service").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    return shlex.split(command)[1:]


def test_the_unit_names_options_that_exist() -> None:
    page = (EXAMPLES.parent / "docs" / "pages" / "command-line.md").read_text()
    name, *words = unit_options()
    assert name == "guard"
    options = {word for word in words if word.startswith("--")}
    assert all(f"`{option}" in page for option in options)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """But for the programs and files of another machine, in whose place there are some of this one."""
    program = tmp_path / "csulora"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = (EXAMPLES / "systemd" / "csulora-guard.service").read_text()
    unit = unit.replace("/opt/csulora/bin/csulora", str(program))
    (tmp_path / "csulora-guard.service").write_text(unit)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "csulora-guard.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "csulora-guard.service" in line]
    assert done.returncode == 0, done.stderr
    assert not said
