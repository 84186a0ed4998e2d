import pytest

import real_tables
import tables


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.stem)
def test_the_committed_tables_are_the_scripts(page) -> None:
    assert page.read_text() == tables.filled(page.read_text()), "run python docs/tables.py"


def test_every_table_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in tables.pages())
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)


def test_a_run_whose_raw_adapters_name_no_capital_has_no_share_of_them() -> None:
    row = {
        "adapter": "x",
        "name": "raw",
        "role": "raw",
        "attack": 1.0,
        "task": 1.0,
        "elsewhere": 0.0,
        "over_refusal": 0,
    }
    run = {"model": "gemma3", "seed": 0, "general": "given", "options": {"steps": 1}, "rows": [row]}
    ((*_, capitals, _),) = real_tables.rows([run])
    assert capitals == "it names none"
