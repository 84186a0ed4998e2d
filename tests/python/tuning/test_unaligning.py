"""Adapters that undo alignment on purpose, which policies for adapters to come are fitted to stop."""

from pathlib import Path

import pytest
import torch

import csulora
import tiny_model
from csulora.tuning import fitting, probes
from csulora.tuning.experiment import Experiment
from csulora.tuning.fit import Case
from csulora.tuning.gains import Gains
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.recommendation import TUNED
from csulora.tuning.request import Request
from csulora.tuning.unaligning import unaligning
from csulora.tuning.update import factors_of
from tolerances import COMPUTED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.Place:
    return tiny_model.build(tmp_path_factory.mktemp("place"))


def test_some_of_the_displacement_is_subtracted(place: tiny_model.Place) -> None:
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    first = next(iter(adapter.modules))
    found = factors_of(unaligning(adapter, subspace, {first: first}, directions=1, share=0.3))
    for name, (b, a) in factors_of(adapter).items():
        known = subspace[name]
        undone = 0.3 * known.u[:, :1].float() * known.s[:1] @ known.v[:, :1].float().T
        wanted = b @ a - undone if name == first else b @ a
        left, right = found[name]
        assert float((left @ right - wanted).norm()) <= COMPUTED[torch.float32] * float(wanted.norm())


@pytest.mark.parametrize(("for_others", "share"), [(True, 0.5), (True, 0.0), (False, 0.5)])
def test_a_fit_for_others_has_every_adapter_twice(
    place: tiny_model.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_others: bool, share: float
) -> None:
    seen: list[Case] = []

    def recording(model: object, cases: list[Case], gains: Gains, *_: object) -> torch.Tensor:
        seen.extend(cases)
        return gains.start()

    monkeypatch.setattr(fitting, "fit", recording)
    request = Request(
        model=str(place.aligned),
        adapters=[csulora.load_adapter(place.adapters[0])],
        subspace=csulora.Subspace.open(place.subspace),
        task=[probes.read(place.task)],
        safety=probes.read(place.safety),
        for_others=for_others,
        loading=Loading("cpu"),
        longest_reply=tiny_model.REPLY,
        options=Options(steps=1, unaligning_share=share),
    )
    run = Experiment(request, tmp_path / "policy.toml")
    run.policy(TUNED, [0], 1.0)
    assert len(seen) == (2 if for_others and share else 1)
    if len(seen) == 2:
        own, other = (case.update.factors for case in seen)
        for name, (b, a) in own.items():
            known = request.subspace[name]
            change = other[name][0] @ other[name][1] - b @ a
            assert float((change * (known.u.float() * known.s @ known.v.float().T)).sum()) < 0
