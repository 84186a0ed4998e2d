import doctest
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from model_to_gguf import convert
from peft import PeftModel
from transformers import AutoModelForCausalLM

import csulora
from csulora.hooks import peft
from example_names import example_names

NAMES = {f"csulora.{name}": getattr(csulora, name) for name in csulora.__all__}
HOOKS = {f"csulora.hooks.peft.{name}": getattr(peft, name) for name in peft.__all__}
# Errors need no example, and the version is no object of ours.
PUBLIC = {
    name: item
    for name, item in (NAMES | HOOKS).items()
    if isinstance(item, (type, FunctionType)) and not (isinstance(item, type) and issubclass(item, Exception))
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What examples may use, and the hosts' loaders."""
    hosts = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    return example_names(tmp_path_factory.mktemp("docstrings")) | hosts


def run_examples(name: str, item: Any, names: dict[str, Any]) -> None:
    tests = list(examples(name, item, names))
    assert tests, f"{name} has no example in its docstring"
    runner = doctest.DocTestRunner()
    failed = [test.name for test in tests if runner.run(test).failed]
    assert not failed


def examples(name: str, item: Any, extra: dict[str, Any]) -> Iterator[doctest.DocTest]:
    item = inspect.unwrap(item)
    module = sys.modules[item.__module__]
    for test in doctest.DocTestFinder().find(item, name, module, vars(module) | extra):
        if test.examples:
            yield test


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_examples_of_a_public_name_run(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(name, PUBLIC[name], names)


@pytest.mark.llama_cpp
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_of_llama_cpp_runs(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    from csulora.hooks.llama_cpp import load

    monkeypatch.chdir(tmp_path)
    convert(AutoModelForCausalLM.from_pretrained(names["aligned"]), tmp_path / "model.gguf", "aligned")
    run_examples("csulora.hooks.llama_cpp.load", load, names | {"gguf": "model.gguf"})
