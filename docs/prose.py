"""Measure the sentences of README.md, of the pages under docs/ and of others, and name those that are too long.

    python docs/prose.py

Code, tables, headings and comments do not count. A list item is a paragraph of its own. Inline code is one word.
Exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]

_PROJECT = ("SECURITY.md", "CONTRIBUTING.md", "findings/README.md", "bench/efficacy/README.md")
_LONG = 25  # words; the share of longer sentences is reported
_FENCE = re.compile(r"\s*(```|~~~)")
_NO_PROSE = re.compile(r"\s*(#|\||<|!!!|\?\?\?|--8<--|-{3,}$|!\[)")
_ITEM = re.compile(r"\s*([-*+]|\d+\.)\s+")
_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+")


@dataclass(frozen=True)
class Sentence:
    """One sentence: where it begins, and how many words it has."""

    file: Path
    line: int
    text: str

    @property
    def words(self) -> int:
        """Number of words."""
        return sum(any(letter.isalnum() for letter in word) for word in self.text.split())


@dataclass(frozen=True)
class Limits:
    """What the sentences of some files may be: words of the median and of the longest, and lines of each file."""

    median: float
    longest: int
    lines: int | None = None


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield every paragraph of a Markdown text with the number of its first line."""
    fenced = False
    start, lines = 1, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        is_fence = _FENCE.match(line) is not None
        item = _ITEM.match(line)
        ends = fenced or is_fence or not line.strip() or _NO_PROSE.match(line)
        if (ends or item) and lines:
            yield start, "\n".join(lines)
            lines = []
        if not ends:
            start = number if not lines else start
            lines.append(line[item.end() :] if item else line)
        fenced ^= is_fence


def sentences(file: Path, text: str) -> Iterator[Sentence]:
    """Yield every sentence of a Markdown text."""
    for line, paragraph in paragraphs(text):
        plain = _LINK.sub(r"\1", _CODE.sub(lambda code: "code" + "\n" * code[0].count("\n"), paragraph))
        at = 0
        for end in [*(match.end() for match in _END.finditer(plain)), len(plain)]:
            if (sentence := plain[at:end]).strip():
                yield Sentence(file, line + plain[:at].count("\n"), " ".join(sentence.split()))
            at = end


def summary(found: Sequence[Sentence]) -> str:
    """Return the figures of some sentences."""
    words = [sentence.words for sentence in found]
    share = sum(count > _LONG for count in words) / len(words)
    return f"{len(words)} sentences, median {median(words):g} words, longest {max(words)}, {share:.1%} over {_LONG}"


def faults(found: Sequence[Sentence], files: Sequence[Path], limits: Limits) -> Iterator[str]:
    """Yield what exceeds the limits, with file and line."""
    for sentence in found:
        if sentence.words > limits.longest:
            where = f"{sentence.file.relative_to(ROOT)}:{sentence.line}"
            advice = f"split it into sentences of at most {limits.longest}"
            yield f"{where}: {sentence.words} words; {advice}: {sentence.text}"
    middle = median(sentence.words for sentence in found)
    names = ", ".join(str(file.relative_to(ROOT)) for file in files[:3])
    if middle > limits.median:
        yield f"{names}: the median sentence has {middle:g} words; at most {limits.median:g} are allowed"
    for file in files if limits.lines else ():
        if (lines := len(file.read_text().splitlines())) > (limits.lines or lines):
            yield f"{file.relative_to(ROOT)}: {lines} lines; move some to docs/, at most {limits.lines} are allowed"


def main() -> int:
    """Print the figures and the faults of README.md, of the project's other documents and of all pages."""
    groups = {
        "README.md": ([ROOT / "README.md"], Limits(median=14, longest=30, lines=130)),
        "project": ([ROOT / name for name in _PROJECT], Limits(median=14, longest=30)),
        "docs": (sorted((ROOT / "docs" / "pages").rglob("*.md")), Limits(median=14, longest=30)),
    }
    wrong = False
    for name, (files, limits) in groups.items():
        found = [sentence for file in files for sentence in sentences(file, file.read_text())]
        if not found:
            print(f"{name}: no sentences")
            continue
        print(f"{name}: {summary(found)}")
        for fault in faults(found, files, limits):
            print(fault, file=sys.stderr)
            wrong = True
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
