import pytest

from csulora.errors import HostError
from csulora.hooks.hosts import SGLANG, VLLM, Host, Series


@pytest.mark.parametrize(
    ("host", "version", "name"),
    [(VLLM, "0.32.1", "0.32"), (VLLM, "0.33.0+cu130", "0.33"), (SGLANG, "0.5.23.post1", "0.5.23")],
)
def test_patch_releases_are_of_their_series(host: Host, version: str, name: str) -> None:
    assert host.series_of(version) == name
    assert host.check(version) is host.series[name]


@pytest.mark.parametrize("version", ["0.3", "0.31.0", "0.320", "0.34.0", "1.32"])
def test_another_series_is_refused_by_name(version: str) -> None:
    with pytest.raises(HostError, match=r"vLLM 0\.32 and 0\.33, and this is " + version.replace(".", r"\.")):
        VLLM.check(version)


def test_function_is_found_where_its_series_has_it() -> None:
    from os.path import join

    assert Series("run", {"join": "os.path"}).function("join") is join


@pytest.mark.parametrize("module", ["os.path", "os.absent"])
def test_function_that_is_not_there_is_named(module: str) -> None:
    with pytest.raises(HostError, match=module + " has no frobnicate.*knows this version of os"):
        Series("run", {"frobnicate": module}).function("frobnicate")
