"""Asks one engine in this process: first unguarded, for reference, and then with the guard put in. Prints JSON.

    python tests/vllm/offline.py REQUEST.json

The request names the model, the subspace file, and the adapters to ask each way.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}

from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest

PROMPT = "how do i"
OPTIONS = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)


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
        return self.answer(self.llm.generate([PROMPT], OPTIONS, lora_request=request, use_tqdm=False)[0])

    def ask_while_another_runs(self, request: LoRARequest, other: LoRARequest, meanwhile: Callable[[], None]) -> dict:
        """Ask for ``request``, which waits until the engine has room for a second adapter."""
        engine = self.llm.llm_engine
        engine.add_request("other", PROMPT, OPTIONS, lora_request=other)
        engine.add_request("waits", PROMPT, OPTIONS, lora_request=request)
        meanwhile()
        finished = {}
        while engine.has_unfinished_requests():
            finished |= {output.request_id.split("-")[0]: output for output in engine.step() if output.finished}
        return self.answer(finished["waits"])

    def answer(self, output: RequestOutput) -> dict[str, list]:
        answer = output.outputs[0]
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

    os.environ["CSULORA_SUBSPACE"] = request["subspace"]
    os.environ["CSULORA_POLICY"] = "csulora"
    from csulora.hooks import vllm as hook

    hook.activate()
    results["lora_request"] = {path: engine.ask(engine.request(path)) for path in request["guarded"]}
    results["add_lora"] = {}
    for path in request["guarded"]:
        added = engine.request(path)
        engine.llm.llm_engine.add_lora(added)
        results["add_lora"][path] = engine.ask(added)
    one, two = request["guarded"]
    upload = shutil.copytree(two, Path(sys.argv[1]).with_name("deleted"))
    results["deleted"] = engine.ask_while_another_runs(
        engine.request(upload), engine.request(one), lambda: shutil.rmtree(upload)
    )
    results["refused"] = {}
    for path in request["bad"]:
        added = engine.request(path)
        results["refused"][path] = [
            engine.attempt(lambda added=added: engine.ask(added)),
            engine.attempt(lambda added=added: engine.llm.llm_engine.add_lora(added)),
        ]
    unchecked = engine.request(one)
    results["unchecked"] = engine.attempt(lambda: engine.llm.llm_engine.engine_core.add_lora(unchecked))
    results["base after"] = engine.ask(None)
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    main()
