import importlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

# Hub look-ups in tests must fail at once, also on a machine that has a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from csulora.serving import decisions

settings.register_profile("csulora", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("csulora")


def pytest_configure() -> None:
    """Fail where a program or module that CSULORA_REQUIRE names is missing, instead of skipping what needs it."""
    for name in os.environ.get("CSULORA_REQUIRE", "").split():
        if shutil.which(name) is None:
            importlib.import_module(name)


@pytest.fixture(scope="session", autouse=True)
def _lines_have_the_schema() -> Iterator[None]:
    """Compare every line that a test's process writes into a decision log with the schema."""
    if find_spec("jsonschema") is None:  # test_decisions.py fails without it
        yield
        return
    jsonschema = importlib.import_module("jsonschema")
    validator = jsonschema.Draft202012Validator(decisions.schema())
    original = decisions.DecisionLog.restore

    def restore(self: decisions.DecisionLog, document: dict[str, Any]) -> None:
        validator.validate(json.loads(json.dumps(document)))
        original(self, document)

    with patch.object(decisions.DecisionLog, "restore", restore):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small matrices, whose threads wait longer than they compute; fixtures of the module have it too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
