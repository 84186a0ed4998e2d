import pytest

import tables


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.stem)
def test_the_committed_tables_are_the_scripts(page) -> None:
    assert page.read_text() == tables.filled(page.read_text()), "run python docs/tables.py"


def test_every_table_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in tables.pages())
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)
