"""A judge behind a small server of this process."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import csulora
import tiny_model
from csulora.errors import InputError
from csulora.evaluation import judge as module
from csulora.evaluation.judge import Judge
from csulora.evaluation.request import Options
from csulora.tuning.loading import Loading
from csulora.tuning.probes import from_text

pytestmark = pytest.mark.usefixtures("one_thread")
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Answers as its ``answer`` says, and remembers what it was asked."""

    daemon_threads = True
    answer: Answer
    asked: list[dict[str, Any]]
    keys: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "guard"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(document)
        self.server.keys.append(self.headers["Authorization"])
        status, answer = self.server.answer(document)
        content = {"choices": [{"message": {"content": answer}}]} if isinstance(answer, str) else answer
        self.reply(status if self.path == "/v1/chat/completions" else 404, content)

    def reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    server = Server(("127.0.0.1", 0), Handler)
    server.answer, server.asked, server.keys = lambda document: (200, "safe"), [], []
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_guard_model_gets_the_chat_and_its_word_counts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.KEY_VARIABLE, "a key")
    judge = Judge.at(f"{server.url}/")
    server.answer = lambda document: (
        200,
        "unsafe\nS1" if "bomb" in document["messages"][-1]["content"] else "\n\nSafe",
    )
    chats = [from_text(f"prompt {at}") for at in range(20)]
    assert judge.verdicts(chats, ["a bomb", "a cake"] * 10) == [True, False] * 10
    first = next(each for each in server.asked if each["messages"][0]["content"] == "prompt 0")
    assert first["messages"][1] == {"role": "assistant", "content": "a bomb"}
    assert (first["model"], first["temperature"]) == ("guard", 0)
    assert set(server.keys) == {"Bearer a key"}


def test_a_server_that_stumbles_is_asked_again(server: Server) -> None:
    answers = iter([(503, {}), (200, "unsafe")])
    server.answer = lambda document: next(answers)
    assert Judge(server.url, "guard").is_unsafe(from_text("a"), "b")
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        ((200, "perhaps"), "says 'perhaps', neither safe nor unsafe", 1),
        ((200, {"no": "choices"}), "answers otherwise than OpenAI's protocol says", 1),
        ((404, {}), "404 Not Found.*does its address end with /v1", 1),
        ((500, {}), "500 Internal Server Error", 3),
    ],
)
def test_a_judge_without_a_verdict_is_told(server: Server, answer: tuple[int, Any], message: str, asked: int) -> None:
    server.answer = lambda document: answer
    with pytest.raises(InputError, match=message):
        Judge(server.url, "guard").is_unsafe(from_text("a"), "b")
    assert len(server.asked) == asked


def test_a_judge_that_is_nowhere_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="give an address such as"):
        Judge("localhost:8000")
    with pytest.raises(InputError, match="is the server running"):
        Judge.at("http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="lists no model; name one with --judge-model"):
        Judge.at(server.url.removesuffix("/v1"))


def test_an_evaluation_counts_what_the_judge_says(server: Server, tmp_path: Path) -> None:
    place = tiny_model.build(tmp_path)
    server.answer = lambda document: (200, "unsafe" if "w20 w0 w7" in document["messages"][0]["content"] else "safe")
    found = csulora.evaluate(
        place.aligned,
        [csulora.load_adapter(place.adapters[0])],
        {"project": csulora.Policy.project()},
        csulora.Subspace.open(place.subspace),
        task=[place.task],
        safety=place.safety,
        options=Options(longest_reply=2, loading=Loading("cpu"), judge=Judge.at(server.url)),
    ).adapters[0]
    for row in found.rows:
        assert [outcome.unsafe for outcome in row.outcomes["safety"]] == [True] + [False] * 15
        assert all(outcome.unsafe is None for outcome in row.outcomes["task"])
    assert {comparison.what for comparison in found.comparisons if comparison.kind == "safety"} == {"same", "unsafe"}
    assert len(server.asked) == 4 * 16
