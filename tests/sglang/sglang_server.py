"""SGLang's server, as the tests start it and ask it."""

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import http_server

GUARDED = [sys.executable, "-m", "csulora", "sglang-serve"]


class Server(http_server.Server):
    """A client of one server."""

    def ask(self, adapter: str | None, prompt: list[int], options: dict[str, Any]) -> dict[str, list]:
        body = {"input_ids": prompt, "sampling_params": options, "return_logprob": True, "lora_path": adapter}
        status, text = self.call("/generate", body)
        assert status == 200, text
        steps = json.loads(text)["meta_info"]["output_token_logprobs"]
        return {"tokens": [token for _, token, _ in steps], "logprobs": [logprob for logprob, _, _ in steps]}

    def load(self, name: str, path: str | Path) -> tuple[int, dict[str, Any]]:
        status, text = self.call("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        return status, json.loads(text)


def running(command: list[object], log: Path, **variables: str) -> AbstractContextManager[Server]:
    """Start a guarded server, wait until it is up, and stop it."""
    return http_server.running(Server, [*GUARDED, *command], log, **variables)
