"""General prompts from the model itself: they begin with given words, end by themselves and are no refusals."""

from pathlib import Path

import pytest
import torch

import tiny_model
from csulora.errors import InputError
from csulora.tuning import probes, self_written
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.self_written import write_general, written

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "<bos> w9 {% for message in messages %}w1 {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
WORDS = ("w3", "w4", "w5", "w6")


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A random model, whose words are drawn nearly evenly, so that some turns end."""
    monkeypatch.setattr(self_written, "FIRST_WORDS", WORDS)
    monkeypatch.setattr(self_written, "_EACH", 24)
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(tiny_model.llama(), tokenizer, tiny_model.REPLY)


def test_turns_are_drawn_for_every_first_word(writer: LanguageModel) -> None:
    chats = write_general(writer, seed=1)
    texts = [chat[0].content for chat in chats]
    assert self_written.FEWEST <= len(texts) <= self_written.COUNT
    assert {text.split()[0] for text in texts} == set(WORDS)
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 3 and "<eos>" not in text for text in texts)
    assert [chat[0].role for chat in chats] == ["user"] * len(chats)


def test_the_same_seed_gives_the_same_prompts_and_leaves_the_generator_alone(writer: LanguageModel) -> None:
    before = torch.random.get_rng_state()
    assert write_general(writer, seed=1) == write_general(writer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert write_general(writer, seed=2) != write_general(writer, seed=1)


def test_refusals_are_left_out_as_turns_and_for_their_replies(writer: LanguageModel) -> None:
    every = write_general(writer, seed=1)
    word = every[0][0].content.split()[1]
    left = write_general(writer, seed=1, refusals=(f"{word} ", f" {word}"))
    assert every[0] not in left
    replies = writer.answers(writer.replies(left))
    assert not any(f" {word}" in text or f"{word} " in text for text in [*replies, *(chat[0].content for chat in left)])


def test_prompts_that_were_seen_are_not_written_again(writer: LanguageModel) -> None:
    every = write_general(writer, seed=1)
    seen = {probes.prompt_hash(chat) for chat in every[:3]}
    assert set(write_general(writer, seed=1, seen=seen)) >= set(every[3:])
    assert not set(write_general(writer, seed=1, seen=seen)) & set(every[:3])


def test_too_few_prompts_are_an_error_that_says_so(writer: LanguageModel) -> None:
    message = (
        r"the model wrote 0 general prompts that are no refusals and get none, of \d+ .* give your own with --general"
    )
    with pytest.raises(InputError, match=message):
        write_general(writer, refusals=("w",))


def test_a_model_without_a_template_writes_none(writer: LanguageModel) -> None:
    writer.tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        write_general(writer)
    writer.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.raises(InputError, match="changes what users say"):
        write_general(writer)


def test_a_file_is_written_once(writer: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(LanguageModel, "open", lambda *arguments: opened.append(arguments) or writer)
    file = tmp_path / "general.txt"
    assert written(file, "model", Loading("cpu"), seed=1) == file
    assert probes.read(file) == write_general(writer, seed=1)
    file.write_text("".join(f"w3 w4 w{number}\n" for number in range(8)))
    assert len(probes.read(written(file, "model", Loading("cpu"), seed=1))) == 8
    assert len(opened) == 1
