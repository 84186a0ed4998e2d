from collections.abc import Iterator

import pytest

import devices


@pytest.fixture(autouse=True, scope="module", params=devices.DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of the core, on every device that there is."""
    devices.use(request.param)
    yield request.param
    devices.use("cpu")
