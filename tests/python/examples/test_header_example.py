from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).parents[3]
HEADER = ROOT / "cpp/include/csulora/csulora.h"
SOURCE = ROOT / "tests/cpp/example.cpp"


def test_the_example_in_the_header_is_the_one_that_is_compiled() -> None:
    comment = [line.removeprefix("///") for line in HEADER.read_text().splitlines() if line.startswith("///")]
    example = dropwhile(lambda line: not line.startswith(" " * 5), comment)
    shown = "\n".join(line.removeprefix(" " * 5) for line in example)
    _, compiled = SOURCE.read_text().split("#include <iostream>\n\n")
    assert compiled == f"{shown}\n"
