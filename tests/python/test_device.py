"""Which device is used, and what a GPU adds to what the core's own tests show."""

import pytest
import torch

import csulora
import factories
import oracle
from csulora import device
from csulora.adapters.lora import Adapter, LoraModule
from csulora.errors import InputError
from csulora.native import _core
from tolerances import COMPUTED

needs_gpu = pytest.mark.skipif(not device.gpu_usable(), reason="no CUDA device")
without_gpu = pytest.mark.skipif(device.gpu_usable(), reason="a CUDA device is there")


def test_the_cpu_is_always_there() -> None:
    assert device.resolve("cpu") == torch.device("cpu")


@without_gpu
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert device.resolve("auto") == torch.device("cpu")


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^device '{name}': (this build of csulora|torch finds no GPU)"):
        device.resolve(name)


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "cuda:-1", ""])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^device '{name}'"):
        device.resolve(name)


@needs_gpu
def test_with_a_gpu_auto_is_the_current_one() -> None:
    assert device.resolve("auto") == device.resolve("cuda") == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize(("process", "expected"), [(0, [0]), (2, [2]), (3, [0]), (7, [1])])
def test_processes_get_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, process: int, expected: list[int]) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(device, "gpu_usable", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device.assign_gpu(process)
    assert chosen == expected


@without_gpu
def test_without_a_gpu_there_is_none_to_assign() -> None:
    device.assign_gpu(1)
    assert device.resolve("auto") == torch.device("cpu")


def _on_gpu(adapter: Adapter) -> Adapter:
    modules = {name: LoraModule(m.b.cuda(), m.a.cuda(), m.scale) for name, m in adapter.modules.items()}
    return Adapter(modules, adapter.config, adapter.path, adapter.sha256)


@needs_gpu
def test_an_adapter_on_a_gpu_is_corrected_where_it_is() -> None:
    adapter, subspace = factories.adapter(), factories.subspace()
    on_gpu, report = csulora.correct(_on_gpu(adapter), subspace, csulora.Policy.csulora())
    on_cpu, reference = csulora.correct(adapter, subspace, csulora.Policy.csulora())
    for name, module in on_cpu.modules.items():
        found = on_gpu.modules[name]
        assert found.b.is_cuda
        assert found.a.is_cuda
        expected = oracle.update(module.b, module.a)
        error = oracle.relative_error(oracle.update(found.b.cpu(), found.a.cpu()), expected)
        assert error <= COMPUTED[torch.float32]
    assert report.worst_undo is not None
    assert reference.worst_undo is not None
    assert report.worst_undo.undo == pytest.approx(reference.worst_undo.undo, rel=1e-6)


@needs_gpu
def test_an_adapter_on_two_devices_is_refused() -> None:
    adapter = factories.adapter()
    name, module = next(iter(adapter.modules.items()))
    adapter.modules[name] = LoraModule(module.b.cuda(), module.a, module.scale)
    with pytest.raises(InputError, match="one device"):
        csulora.correct(adapter, factories.subspace(), csulora.Policy.csulora())


@needs_gpu
def test_the_core_refuses_inputs_on_two_devices() -> None:
    factors, subspace = factories.lora_factors(20, 16, 3), factories.core_subspace(20, 16, 4)
    on_gpu = _core.Subspace(subspace.u.cuda(), subspace.s.cuda(), subspace.v.cuda())
    with pytest.raises(InputError, match=r"^layer: .*one device"):
        _core.correct([_core.CorrectionTask(factors, on_gpu, _core.Penalties(0, 1, 1), "layer")])
    with pytest.raises(InputError, match="one device"):
        _core.extract_subspace(torch.ones(8, 6), torch.ones(8, 6).cuda())


@needs_gpu
def test_work_goes_to_the_current_stream() -> None:
    """What is enqueued before on the same stream is seen, without anybody waiting for it."""
    subspace = factories.core_subspace(300, 200, 24)
    on_gpu = _core.Subspace(subspace.u.cuda(), subspace.s.cuda(), subspace.v.cuda())
    factors = factories.lora_factors(300, 200, 8)
    b, a = factors.b.cuda(), factors.a.cuda()
    late = torch.zeros_like(b)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(b)
        tasks = [_core.CorrectionTask(_core.LoraFactors(late, a), on_gpu, _core.Penalties(0, 1, 1), "layer")]
        (result,) = _core.correct(tasks)
        reference = oracle.closest_safe_update(
            oracle.update(factors.b, factors.a), subspace.u, subspace.v, (0.0, 1.0, 1.0)
        )
        best = oracle.best_approximation(reference, 8)
        found = oracle.update(result.factors.b.cpu(), result.factors.a.cpu())
    assert float((found - best).norm()) <= COMPUTED[torch.float32] * float(reference.norm())


@needs_gpu
def test_repeated_corrections_keep_no_memory() -> None:
    subspace = factories.core_subspace(300, 200, 24)
    on_gpu = _core.Subspace(subspace.u.cuda(), subspace.s.cuda(), subspace.v.cuda())
    factors = factories.lora_factors(300, 200, 8)
    tasks = [
        _core.CorrectionTask(
            _core.LoraFactors(factors.b.cuda(), factors.a.cuda()), on_gpu, _core.Penalties(0, 1, 1), str(i)
        )
        for i in range(8)
    ]
    _core.correct(tasks)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        _core.correct(tasks)
    assert torch.cuda.memory_allocated() == before
