"""Asks one guarded engine for adapters of experts, and prints JSON.

    python tests/sglang/experts_engine.py REQUEST.json

The request names the model, the prompt and the adapters.
"""

import json
import sys
from pathlib import Path

import expert_kernels
from engine import load
from options import ENGINE

expert_kernels.install()  # also in schedulers, which import this module


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    from csulora.hooks import sglang as hook

    hook.activate()
    import sglang

    settings = ENGINE | {"max_lora_rank": request["max_rank"]}
    engine = sglang.Engine(model_path=request["model"], log_level="error", skip_tokenizer_init=True, **settings)
    options = {"max_new_tokens": request["steps"], "temperature": 0, "ignore_eos": True}

    def answer(adapter: str | None) -> dict[str, list]:
        found = engine.generate(
            input_ids=request["prompt"], sampling_params=options, lora_path=adapter, return_logprob=True
        )
        steps = found["meta_info"]["output_token_logprobs"]
        return {"tokens": [token for _, token, _ in steps], "logprobs": [logprob for logprob, _, _ in steps]}

    results = {"base": answer(None)}
    loaded = {name: load(engine, name, path) for name, path in request["adapters"].items()}
    # The engine holds two adapters at a time: the first ones were evicted, and are loaded again.
    results |= {name: reason or answer(name) for name, reason in loaded.items()}
    print("RESULTS", json.dumps(results), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
