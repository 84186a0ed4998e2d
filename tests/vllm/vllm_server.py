"""vLLM's server, as the tests start it and ask it."""

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import http_server

GUARDED = [sys.executable, "-m", "csulora", "vllm-serve"]
PLAIN = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16"]
OPTIONS += ["--block-size", "32"]  # so that prompts of the tests fill some


class Server(http_server.Server):
    """A client of one server."""

    def ask(self, model: str, prompt: str = "how do i", tokens: int = 8) -> dict[str, list]:
        options = {"max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        status, text = self.call("/v1/completions", {"model": model, "prompt": prompt, **options})
        assert status == 200, text
        logprobs = json.loads(text)["choices"][0]["logprobs"]
        return {"tokens": logprobs["tokens"], "logprobs": logprobs["token_logprobs"]}

    def load(self, name: str, path: Path, in_place: bool = False) -> tuple[int, str]:
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": in_place}
        return self.call("/v1/load_lora_adapter", body)


def running(command: list[str], log: Path, **variables: str) -> AbstractContextManager[Server]:
    """Start a server that loads adapters at run time, wait until it is up, and stop it."""
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | variables
    return http_server.running(Server, [*command, *OPTIONS], log, **variables)
