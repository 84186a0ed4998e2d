"""Asks one engine in this process: first unguarded, for reference, and then with the guard put in. Prints JSON.

    python tests/vllm/offline.py REQUEST.json

The request names the model, the pack, and the adapters to ask each way.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PROMPT = "how do i"


class Engine:
    """One engine; every request for an adapter is a new one to vLLM."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(
            model,
            enable_lora=True,
            max_lora_rank=16,
            enforce_eager=True,
            dtype="float32",
            distributed_executor_backend="uni",
        )
        self.requests = 0

    def request(self, path: str | Path, name: str | None = None) -> LoRARequest:
        self.requests += 1
        return LoRARequest(name or f"adapter-{self.requests}", self.requests, str(path))

    def ask(self, request: LoRARequest | None) -> dict[str, list]:
        options = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
        answer = self.llm.generate([PROMPT], options, lora_request=request, use_tqdm=False)[0].outputs[0]
        chosen = [step[token] for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        return {"tokens": [one.decoded_token for one in chosen], "logprobs": [one.logprob for one in chosen]}

    def attempt(self, action) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "let through"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    engine = Engine(request["model"])
    results = {"base": engine.ask(None)}
    results["plain"] = {path: engine.ask(engine.request(path)) for path in request["plain"]}

    os.environ["CSULORA_SUBSPACE"] = request["pack"]
    from csulora.hooks import vllm as hook

    hook.activate()
    results["lora_request"] = {path: engine.ask(engine.request(path)) for path in request["guarded"]}
    results["add_lora"] = {}
    for path in request["guarded"]:
        added = engine.request(path)
        engine.llm.llm_engine.add_lora(added)
        results["add_lora"][path] = engine.ask(added)
    results["refused"] = {}
    for path in request["bad"]:
        added = engine.request(path)
        results["refused"][path] = [
            engine.attempt(lambda added=added: engine.ask(added)),
            engine.attempt(lambda added=added: engine.llm.llm_engine.add_lora(added)),
            engine.attempt(lambda added=added: engine.llm.llm_engine.engine_core.add_lora(added)),  # the worker itself
        ]
    results["base after"] = engine.ask(None)
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    main()
