from pathlib import Path

import pytest

from prose import ROOT, Limits, faults, sentences, summary

FILE = ROOT / "README.md"


def words_of(text: str) -> list[int]:
    return [sentence.words for sentence in sentences(FILE, text)]


def test_sentences_are_counted_across_lines() -> None:
    assert words_of("One two\nthree. Four five!\n\nSix?") == [3, 2, 1]


@pytest.mark.parametrize(
    "text", ["# A heading", "| a | table |", "```\nsome code\n```", "<!-- a comment -->", "![a picture](a.svg)"]
)
def test_what_is_no_prose_does_not_count(text: str) -> None:
    assert words_of(f"{text}\nOne two.") == [2]


def test_list_items_are_paragraphs() -> None:
    assert words_of("- one two\n- three\n  four five") == [2, 3]


def test_inline_code_is_one_word_and_links_are_their_texts() -> None:
    assert words_of("Run `csulora correct. Now` and [read on](pages/next.md).") == [5]


def test_a_fault_names_file_and_line() -> None:
    found = list(sentences(FILE, "Short.\n\nOne.\nThis one has five words."))
    (fault,) = faults(found, [], Limits(median=14, longest=4))
    assert fault.startswith("README.md:4: 5 words; split it into sentences of at most 4: This one")


def test_a_high_median_and_too_many_lines_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "line\n" * 3)
    found = list(sentences(FILE, "One two three."))
    median, lines = faults(found, [FILE], Limits(median=2, longest=30, lines=2))
    assert median == "README.md: the median sentence has 3 words; at most 2 are allowed"
    assert lines == "README.md: 3 lines; move some to docs/, at most 2 are allowed"


def test_the_summary_gives_the_share_of_long_sentences() -> None:
    found = list(sentences(FILE, f"One two. {'word ' * 26}."))
    assert summary(found) == "2 sentences, median 14 words, longest 26, 50.0% over 25"
