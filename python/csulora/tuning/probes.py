"""Files of prompts: plain text, one prompt a line, or JSON lines of chats."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.io.files import read_regular
from csulora.policy.provenance import HASH_DIGITS

FEWEST = 8  # prompts; a quarter of them is in the validation split
MOST = 1024
_LARGEST_FILE = 1 << 30  # bytes
_LONGEST = 8192  # characters in one prompt
_SHOWN = 60  # characters of a prompt in a message
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat: who speaks (system, user or assistant), and what is said."""

    role: str
    content: str


Chat = tuple[Message, ...]
"""A prompt: a chat that ends with the user's turn."""


def read(path: str | Path, fewest: int = FEWEST, most: int = MOST) -> tuple[Chat, ...]:
    """Read a file of ``fewest`` to ``most`` prompts, see `parse`.

    Raises:
        InputError: the file is missing, malformed, too large, or has too few prompts or one of them twice.

    >>> _ = Path("task.txt").write_text("".join(f"what is {number} plus 1?\\n" for number in range(8)))
    >>> len(read("task.txt"))
    8
    """
    data = read_regular(Path(path), _LARGEST_FILE)
    try:
        return parse(data, fewest, most)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(data: bytes, fewest: int = FEWEST, most: int = MOST) -> tuple[Chat, ...]:
    """Read the bytes of a file of ``fewest`` to ``most`` prompts.

    If the first line that is not blank begins with ``{``, every line is a JSON object: ``{"messages": [{"role": ...,
    "content": ...}, ...]}``, whose last turn is dropped if it is the assistant's, or ``{"prompt": "..."}``. Otherwise
    every line is a prompt. Blank lines do not count.

    Raises:
        InputError: anything else, naming the line.

    >>> chats = parse(b"\\n".join(b"what is %d plus 1?" % number for number in range(8)))
    >>> len(chats), chats[2][-1].content
    (8, 'what is 2 plus 1?')
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}") from error
    if _is_json_array(text):
        raise InputError("a JSON array; give an object a line")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not fewest <= len(lines) <= most:
        raise InputError(f"holds {len(lines)} prompts; give {fewest} to {most}, one a line")
    if lines[0][1].startswith("[{") and _is_json_array(lines[0][1]):
        raise InputError(f'line {lines[0][0]}: a JSON array; write {{"messages": [...]}}, with the turns in the array')
    is_json = lines[0][1].startswith("{")
    chats: dict[Chat, int] = {}
    for number, line in lines:
        try:
            chat = _from_json(line) if is_json else from_text(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number}: {error}") from error
        if chat in chats:
            raise InputError(f"line {number}: the same prompt as on line {chats[chat]}; remove one of them")
        chats[chat] = number
    return tuple(chats)


def from_text(text: object) -> Chat:
    """Return the prompt that a user's turn alone is; raises ValueError where it is no text, empty or too long.

    >>> from_text("tell me a tale")
    (Message(role='user', content='tell me a tale'),)
    """
    return (_message("user", text),)


def check_apart(safety: Sequence[Chat], kind: str, chats: Sequence[Chat]) -> None:
    """Raise `InputError` if a prompt of another kind is a safety prompt, too.

    >>> check_apart([from_text("tell me a tale")], "general", [from_text("Tell me  a tale")])
    Traceback (most recent call last):
    ...
    csulora.errors.InputError: 'Tell me  a tale' is a general prompt and a safety prompt; it can be answered in one \
way: remove it from one file
    """
    hashes = {prompt_hash(chat) for chat in safety}
    for chat in chats:
        if prompt_hash(chat) in hashes:
            raise InputError(
                f"{shown(chat)} is a {kind} prompt and a safety prompt; it can be answered in one way: "
                "remove it from one file"
            )


def is_refusal(answer: str, refusals: Sequence[str]) -> bool:
    """Whether an answer holds one of the texts that refusals hold, in any case of letters.

    >>> is_refusal("Sorry, I can not do that.", ["sorry"])
    True
    """
    return any(text.casefold() in answer.casefold() for text in refusals)


def shown(chat: Chat) -> str:
    """Return a prompt as messages name it.

    >>> shown((Message("user", "tell me a tale"),))
    "'tell me a tale'"
    """
    text = chat[-1].content
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def prompt_hash(chat: Chat) -> str:
    """Return the hash by which a policy file names a prompt: the same for other spaces, capitals and widths of letters.

    >>> prompt_hash((Message("user", "Tell me  a tale "),)) == prompt_hash((Message("user", "tell me a tale"),))
    True
    """
    turns = [[turn.role, " ".join(unicodedata.normalize("NFKC", turn.content).casefold().split())] for turn in chat]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:HASH_DIGITS]


def _is_json_array(text: str) -> bool:
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _from_json(line: str) -> Chat:
    try:
        document: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON, as every line must be where the first begins with {{: {error}") from error
    if isinstance(document, dict) and set(document) == {"prompt"}:
        return from_text(document["prompt"])
    turns = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('not an object with "messages", a list of turns, or with "prompt" alone')
    return from_turns(turns)


def from_turns(turns: Sequence[Any]) -> Chat:
    """Return the prompt that turns are, objects with role and content; raises ValueError for anything else.

    The last turn is dropped if it is the assistant's.

    >>> from_turns([{"role": "user", "content": "tell me a tale"}, {"role": "assistant", "content": "Once."}])
    (Message(role='user', content='tell me a tale'),)
    """
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a turn is no object with role and content")
    chat = [_message(turn.get("role"), turn.get("content")) for turn in turns]
    if chat and chat[-1].role == "assistant":
        chat.pop()
    if not chat or chat[-1].role != "user":
        raise ValueError("the last turn, but for the assistant's reply, must be the user's")
    return tuple(chat)


def _message(role: object, content: object) -> Message:
    if role not in _ROLES:
        raise ValueError(f"a turn has the role {role!r}; it must be one of {', '.join(_ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError("a turn has no text")
    if len(content) > _LONGEST:
        raise ValueError(f"a turn has {len(content)} characters; at most {_LONGEST} are taken")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can escape half a surrogate pair
        raise ValueError("a turn holds half a surrogate pair") from None
    return Message(str(role), content)
