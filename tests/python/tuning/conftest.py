"""A tiny aligned model with its adapters, for everything that runs one."""

import pytest

import tiny_model
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def language_model(place: tiny_model.Place) -> LanguageModel:
    return LanguageModel.open(str(place.aligned), Loading("cpu"), tiny_model.REPLY)
