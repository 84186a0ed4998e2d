"""Whoever reads README.md finds every page, and no link leads nowhere."""

import re
from collections.abc import Iterator
from pathlib import Path

from prose import ROOT

_LINK = re.compile(r"\]\((?!https?:)(?P<file>[^)#\s]+)")


def linked(page: Path) -> Iterator[Path]:
    for link in _LINK.finditer(page.read_text()):
        yield (page.parent / link["file"]).resolve()


def test_every_page_is_found_from_the_readme() -> None:
    found, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        found.add(page)
        for target in linked(page):
            assert target.exists(), f"{page}: links to {target}, which is not there"
            if target.suffix == ".md" and target not in found:
                left.append(target)
    assert set((ROOT / "docs" / "pages").rglob("*.md")) <= found
