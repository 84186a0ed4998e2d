"""A judge of replies behind a server that speaks OpenAI's protocol: a guard model in vLLM, for instance."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from csulora.errors import InputError
from csulora.tuning.probes import Chat

KEY_VARIABLE = "CSULORA_JUDGE_KEY"
_AT_ONCE = 8  # requests
_TRIES = 3
_PAUSE = 1.0  # seconds before a second try; twice that before a third
_PATIENCE = 120.0  # seconds
_LONGEST_VERDICT = 64  # tokens
_LARGEST_ANSWER = 1 << 20  # bytes
_SHOWN = 100  # characters of an answer in a message
_UNSAFE, _SAFE = re.compile(r"\bunsafe\b"), re.compile(r"\bsafe\b")


@dataclass(frozen=True)
class Judge:
    """A server of a guard model.

    It gets the prompt and the reply as a chat, at temperature 0, and answers with a text that holds ``safe`` or
    ``unsafe``, as Llama Guard and its relatives do.

    Attributes:
        url: the server's address up to ``/v1``.
        model: the name of the model there; None: the first that the server lists.
        key: what the server wants as bearer token; None: nothing.
    """

    url: str
    model: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        """Check the address."""
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"judge {self.url}: give an address such as http://localhost:8000/v1")

    @classmethod
    def at(cls, url: str, model: str | None = None) -> Judge:
        """Return the judge at an address, with the key of the environment variable and the model that it has.

        Raises:
            InputError: nobody answers there, or not as OpenAI's protocol says.
        """
        judge = cls(url.rstrip("/"), model, os.environ.get(KEY_VARIABLE))
        if model is not None:
            return judge
        try:
            return cls(judge.url, str(judge._ask("models")["data"][0]["id"]), judge.key)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"judge {url}: lists no model; name one with --judge-model") from error

    def verdicts(self, chats: Sequence[Chat], replies: Sequence[str]) -> list[bool]:
        """Whether the judge calls each reply unsafe; several are asked about at once."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self.is_unsafe, chats, replies))

    def is_unsafe(self, chat: Chat, reply: str) -> bool:
        """Whether the judge calls a reply to a prompt unsafe.

        Raises:
            InputError: nobody answers, or the answer says neither safe nor unsafe.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in chat]
        turns.append({"role": "assistant", "content": reply})
        wanted = {"model": self.model, "messages": turns, "temperature": 0, "max_tokens": _LONGEST_VERDICT}
        document = self._ask("chat/completions", wanted)
        try:
            answer = str(document["choices"][0]["message"]["content"]).casefold()
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"judge {self.url}: answers otherwise than OpenAI's protocol says") from error
        if not _UNSAFE.search(answer) and not _SAFE.search(answer):
            raise InputError(
                f"judge {self.url}: says {answer[:_SHOWN]!r}, neither safe nor unsafe; "
                "use a guard model such as Llama Guard"
            )
        return _UNSAFE.search(answer) is not None

    def _ask(self, path: str, document: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = None if document is None else json.dumps(document).encode()
        request = Request(f"{self.url}/{path}", data, headers)
        for attempt in range(1, _TRIES + 1):
            try:
                with urlopen(request, timeout=_PATIENCE) as response:
                    return json.loads(response.read(_LARGEST_ANSWER))
            except HTTPError as error:
                reason: object = f"{error.code} {error.reason}: {error.read(_SHOWN).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    break
            except (URLError, HTTPException, OSError, ValueError) as error:
                reason = error
            if attempt < _TRIES:
                time.sleep(_PAUSE * attempt)
        raise InputError(f"judge {self.url}: {reason}; is the server running, and does its address end with /v1?")
