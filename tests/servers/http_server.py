"""A server in a process of its own, and a client of it."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PATIENCE = 600  # seconds


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

    def healthy(self) -> bool:
        return self.call("/health")[0] == 200


S = TypeVar("S", bound=Server)


@contextmanager
def running(made: Callable[[int], S], command: list[object], log: Path, **variables: str) -> Iterator[S]:
    """Start a server on a free port, wait until it is healthy, and stop it; ``made`` is its client's class."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in (*command, "--port", port)]
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=os.environ | variables)
        try:
            server = made(port)
            _wait(server, process, log)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if server.healthy():
                return
        except OSError:  # nobody listens yet
            pass
        time.sleep(0.5)
    raise AssertionError(f"the server is not up after {PATIENCE} seconds: {log.read_text()[-4000:]}")
