import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora.errors import InputError
from csulora.tuning.probes import FEWEST, MOST, Message, parse, read

LINES = [f"question {number}" for number in range(FEWEST)]


def user(*texts: str) -> tuple[tuple[Message, ...], ...]:
    return tuple((Message("user", text),) for text in texts)


def test_reads_one_prompt_a_line_and_skips_blank_ones() -> None:
    assert parse("\n\r\n  ".join(LINES).encode()) == user(*LINES)


def test_reads_chats_and_drops_the_reply() -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    chats = [{"messages": [*turns, {"role": "assistant", "content": "hi"}]}, *({"prompt": line} for line in LINES)]
    data = "\n".join(map(json.dumps, chats)).encode()
    assert parse(data) == ((Message("system", "be brief"), Message("user", "hello")), *user(*LINES))


def test_a_json_array_is_not_taken_for_text() -> None:
    lines = ",\n".join(json.dumps({"prompt": line}) for line in LINES)
    for data in (f"[\n{lines}\n]", f"[{lines}]", json.dumps(LINES, indent=1)):
        with pytest.raises(InputError, match="a JSON array; give an object a line"):
            parse(data.encode())
    turns = "\n".join(json.dumps([{"role": "user", "content": line}]) for line in LINES)
    with pytest.raises(InputError, match=r'line 1: a JSON array; write {"messages": \[...\]}'):
        parse(turns.encode())
    assert parse("\n".join(f"[INST] {line}" for line in LINES).encode()) == user(*(f"[INST] {line}" for line in LINES))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2"),
        ("[1]", "line 2: not an object"),
        ('{"messages": []}', "line 2: the last turn"),
        ('{"messages": [1]}', "line 2: not an object"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "line 2: the last turn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 2: a turn has the role 'robot'"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "line 2: a turn has the role"),
        ('{"prompt": 3}', "line 2: a turn has no text"),
        ('{"prompt": " "}', "line 2: a turn has no text"),
        ('{"prompt": "\\ud800"}', "line 2: a turn holds half"),
        (json.dumps({"prompt": "x" * 9000}), "line 2: a turn has 9000 characters"),
        ("[" * 100_000, "line 2"),
        ('{"prompt": "question 0"}', "line 2: the same prompt as on line 1"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    good = [json.dumps({"prompt": text}) for text in LINES]
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        parse("\n".join([good[0], line, *good[1:]]).encode())


@pytest.mark.parametrize("count", [0, FEWEST - 1, MOST + 1])
def test_too_few_or_too_many_prompts_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"holds {count} prompts"):
        parse("\n".join(f"question {number}" for number in range(count)).encode())


def test_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"task\.txt: not UTF-8"):
        read(tmp_path / "task.txt")
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.txt")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "prompt"]), inner)
    ),
    max_leaves=8,
)


@given(
    data=st.binary()
    | st.lists(json_values, min_size=FEWEST).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
def test_anything_is_read_or_refused(data: bytes) -> None:
    try:
        chats = parse(data)
    except InputError:
        return
    assert all(chat[-1].role == "user" for chat in chats)
