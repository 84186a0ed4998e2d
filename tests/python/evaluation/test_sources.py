"""Where prompts come from: files, columns of tables, data sets of the hub."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csulora.errors import InputError
from csulora.evaluation.sources import chats_of, read
from csulora.tuning.probes import Message, from_text

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "tell me a tale"}]


def test_text_and_chats_are_read_however_few(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("tell me a tale\n\n")
    assert read(str(path)) == (from_text("tell me a tale"),)
    path.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}')
    assert read(str(path)) == chats_of(path) == (from_text("hi"),)
    assert chats_of(["a", (Message("system", "be brief"), Message("user", "b"))])[1][0].role == "system"


def test_a_column_of_a_csv_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('\ufeffid,the prompt\n1,"a, ""b""\nand c"\n2,d\n')
    assert read(f"{path}#the prompt") == (from_text('a, "b"\nand c'), from_text("d"))


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("p.csv", "a\nb\n", "say which column is meant"),
        ("p.csv#c", "a,b\nx,y\n", "has no column 'c'; it has 'a', 'b'"),
        ("p.csv#a", "a,a\nx,y\n", "has 2 columns 'a'; rename all but one"),
        ("p.csv#a", "", "has no column 'a'; it has none"),
        ("p.csv#a", "a,b\nx,y\nx,z\n", "prompt 2: the same as prompt 1"),
        ("p.csv#b", "a,b\nx\n", "prompt 1: a turn has no text"),
        ("p.csv#a", 'a\n"x', "not a readable CSV file"),
        ("p.txt", "", "holds 0 prompts"),
        ("p.parquet#a", "no Parquet", "pyarrow|not a readable Parquet file"),
        ("p.txt#a", "x\n", r"a column is of a file that ends with .csv or .parquet; leave #a out"),
        ("none.txt", "", "^none.txt: no such file"),
        ("none.parquet#a", "", "^none.parquet: no such file"),
    ],
)
def test_what_cannot_be_read_is_told(
    source: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not source.startswith("none"):
        Path(source.partition("#")[0]).write_text(text)
    with pytest.raises((InputError, OSError), match=message):
        read(source)


def test_a_column_of_a_parquet_file_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2], "chat": [TURNS, TURNS[1:]]}), tmp_path / "p.parquet")
    first, second = read(f"{tmp_path / 'p.parquet'}#chat")
    assert (first[0].content, second) == ("be brief", from_text("tell me a tale"))
    with pytest.raises(InputError, match="has no column 'prompt'; it has 'id', 'chat'"):
        read(f"{tmp_path / 'p.parquet'}#prompt")


def test_a_parquet_column_that_is_damaged_or_stands_twice_is_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, no_texts = pyarrow.array(["a"]), pyarrow.array([b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"p": no_texts}), tmp_path / "damaged.parquet")
    parquet.write_table(pyarrow.Table.from_arrays([texts, texts], names=["p", "p"]), tmp_path / "twice.parquet")
    with pytest.raises(InputError, match=r"column 'p' is not readable: .*utf-8"):
        read(f"{tmp_path / 'damaged.parquet'}#p")
    with pytest.raises(InputError, match="has 2 columns 'p'; rename all but one"):
        read(f"{tmp_path / 'twice.parquet'}#p")


class Rows(dict[str, list[Any]]):
    column_names = ("prompt", "chat")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:org/name/test#prompt", ("org/name", None, "test", None)),
        ("hf:org/name@v1/default/train#chat", ("org/name", "default", "train", "v1")),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for(
    source: str, expected: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, configuration: str | None, *, split: str, revision: str | None) -> Rows:
        assert (name, configuration, split, revision) == expected
        return Rows(prompt=["tell me a tale"], chat=[TURNS[1:]])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read(source) == (from_text("tell me a tale"),)
    with pytest.raises(InputError, match="has no column 'text'"):
        read(f"{source.partition('#')[0]}#text")


def test_a_malformed_data_set_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not of the form hf:ORG/NAME/SPLIT#COLUMN"):
        read("hf:name#prompt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets; pip install 'csulora\[datasets\]'"):
        read("hf:org/name/test#prompt")
