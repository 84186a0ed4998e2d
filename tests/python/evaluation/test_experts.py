"""An evaluation of experts that the model stacks, and that a policy scales one by one."""

from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

import csulora
import tiny_model
from csulora.evaluation.request import Options
from csulora.policy.overrides import Override
from csulora.tuning.loading import Loading
from expert_families import EXPERT_FAMILIES
from model_families import built, save_expert_pair, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def test_a_model_of_experts_is_evaluated_as_peft_runs_it(tmp_path: Path) -> None:
    family = EXPERT_FAMILIES["Qwen 3 MoE"]
    model = built(family)
    save_expert_pair(model, tmp_path)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=family.parameters)
    adapted = get_peft_model(model, config)
    train(adapted, scale=0.5, seed=0)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    subspace = csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=2, modules=["*.experts.*"])
    policy = csulora.Policy.none(
        overrides=(Override("*.experts.1.*", gains=(0.0,) * 4), Override("*", gains=(0.5,) * 4))
    )
    prompts = tiny_model.prompts("w21", 6).splitlines()
    adapter = csulora.load_adapter(tmp_path / "adapter")
    _, raw, corrected, _ = (
        csulora.evaluate(
            tmp_path / "aligned",
            [adapter],
            {"experts": policy},
            subspace,
            task=[prompts],
            safety=["w1 w2"],
            options=Options(longest_reply=4, loading=Loading("cpu")),
        )
        .adapters[0]
        .rows
    )
    fixed, _ = csulora.correct(adapter, subspace, policy)
    csulora.save_adapter(fixed, tmp_path / "fixed")
    for row, directory in ((raw, "adapter"), (corrected, "fixed")):
        served = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "aligned"), str(tmp_path / directory))
        tokenizer = tiny_model.tokenizer()
        for prompt, outcome in zip(prompts, row.outcomes["task"], strict=True):
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            reply = served.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)[0, tokens.shape[1] :]
            assert outcome.text == tokenizer.decode(reply, skip_special_tokens=True)
