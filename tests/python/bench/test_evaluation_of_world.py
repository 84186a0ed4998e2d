"""`csulora.evaluate` on the efficacy world finds what the lab finds with plain PEFT, for the same prompts."""

from pathlib import Path

import evaluate
import pytest
import world
from peft import PeftModel
from transformers import AutoTokenizer

import csulora
from csulora.evaluation.request import Options
from csulora.tuning.loading import Loading

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
FIXTURE = Path(evaluate.__file__).parent / "fixture"
REFUSALS = (world.REFUSAL_START,)


def test_replies_and_rates_are_the_labs(tmp_path: Path) -> None:
    every = world.probes()
    probes = world.Probes(every.attack[::20], every.task[::40], every.benign[::20])
    subspace = csulora.extract(FIXTURE / "base", FIXTURE / "aligned", rank=16)
    adapter = csulora.load_adapter(FIXTURE / "adapter")
    policies = {"project": csulora.Policy.project(), "scaled": csulora.controls.scaling_policy(0.2)}
    found = csulora.evaluate(
        FIXTURE / "aligned",
        [adapter],
        policies,
        subspace,
        task=[[example.prompt for example in probes.task]],
        safety=[example.prompt for example in probes.attack],
        general=[example.prompt for example in probes.benign],
        options=Options(REFUSALS, longest_reply=evaluate.MAX_REPLY, loading=Loading("cpu"), incoherence=1e9),
    )
    rows = {row.name: row for row in found.adapters[0].rows}
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "aligned")
    kinds = {"safety": probes.attack, "task": probes.task, "general": probes.benign}
    for name, policy in (("raw", csulora.Policy.none()), *policies.items()):
        fixed, _ = csulora.correct(adapter, subspace, policy)
        csulora.save_adapter(fixed, tmp_path / name)
        served = PeftModel.from_pretrained(evaluate.load_model(FIXTURE / "aligned"), tmp_path / name)
        said = {kind: evaluate.reply_all(served, tokenizer, examples) for kind, examples in kinds.items()}
        for kind in kinds:
            assert [outcome.text for outcome in rows[name].outcomes[kind]] == said[kind]
        rates = world.score(probes, *said.values())
        refused = rows[name].tally("safety").refused
        assert refused is not None
        assert refused.value == rates.refusal
        if rates.task == 1:
            assert rows[name].tally("task").same.value == 1
    safety = {name: row.tally("safety").same.value for name, row in rows.items()}
    assert (safety["model alone"], safety["raw"]) == (1, 0)
    assert rows["model alone"].tally("task").same.value < 0.5
