"""Asks one guarded engine in this process for adapters of experts. Prints JSON.

    python tests/vllm/experts_offline.py REQUEST.json

The request names the model, the adapters, and what the server and its clients say of layouts.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}

import expert_kernels
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from csulora.hooks import vllm as hook


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    expert_kernels.install()
    hook.activate()
    llm = LLM(
        request["model"],
        enable_lora=True,
        max_lora_rank=8,
        enable_mixed_moe_lora_format=request["mixed"],
        enforce_eager=True,
        dtype="float32",
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    options = SamplingParams(temperature=0, max_tokens=request["steps"], logprobs=0, ignore_eos=True, detokenize=False)

    def ask(lora: LoRARequest | None) -> dict[str, list] | str:
        try:
            prompt = {"prompt_token_ids": request["prompt"]}
            found = llm.generate([prompt], options, lora_request=lora, use_tqdm=False)[0].outputs[0]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        chosen = [step[token].logprob for step, token in zip(found.logprobs, found.token_ids, strict=True)]
        return {"tokens": list(found.token_ids), "logprobs": chosen}

    loras = {
        path: LoRARequest(path, i, path, is_3d_lora_weight=request["claim"])
        for i, path in enumerate(request["adapters"], start=1)
    }
    results = {"base": ask(None)} | {path: ask(lora) for path, lora in loras.items()}
    # The engine holds one adapter at a time: each of these was evicted and is loaded again.
    results |= {f"{path} again": ask(lora) for path, lora in loras.items()}
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    main()
