"""vLLM's server in a process of its own, and a client of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

GUARDED = [sys.executable, "-m", "csulora", "vllm-serve"]
PLAIN = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16"]
OPTIONS += ["--block-size", "32"]  # so that prompts of the tests fill some


class Server:
    """A client of one server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def call(self, path: str, body: dict | None = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, model: str, prompt: str = "how do i", tokens: int = 8) -> dict[str, list]:
        options = {"max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        status, text = self.call("/v1/completions", {"model": model, "prompt": prompt, **options})
        assert status == 200, text
        logprobs = json.loads(text)["choices"][0]["logprobs"]
        return {"tokens": logprobs["tokens"], "logprobs": logprobs["token_logprobs"]}

    def load(self, name: str, path: Path, in_place: bool = False) -> tuple[int, str]:
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": in_place}
        return self.call("/v1/load_lora_adapter", body)

    def healthy(self) -> bool:
        return self.call("/health")[0] == 200


@contextmanager
def running(command: list[str], log: Path, **variables: str) -> Iterator[Server]:
    """Start a server, wait until it is up, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | variables
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *OPTIONS], stdout=output, stderr=output, env=environment, text=True
        )
        try:
            server = Server(port)
            for _ in range(1200):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    if server.healthy():
                        break
                except OSError:
                    time.sleep(0.5)
            else:
                raise AssertionError(f"the server is not up after ten minutes: {log.read_text()[-4000:]}")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
