"""A tiny aligned model with its adapters, for everything that runs one."""

import pytest

import tiny_host
from csulora.tuning.host import Host


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_host.Place:
    return tiny_host.build(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def host(place: tiny_host.Place) -> Host:
    return Host.open(str(place.aligned), "cpu", tiny_host.REPLY)
