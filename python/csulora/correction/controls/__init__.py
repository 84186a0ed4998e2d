"""What a correction is compared with: scaling, other directions, and Safe LoRA.

Every control takes an adapter and a subspace file, and returns the changed adapter with its report. `csulora.correct`
and all controls measure in the same subspace, so that their reports can be compared. A control that cannot be told from
a policy shows that the policy does not need the alignment's directions.

    from csulora import controls
    weaker, report = controls.scaling(adapter, subspace, 0.5)
    csulora.save_adapter(weaker, "my-adapter-half")
"""

from csulora.correction.controls.baselines import other_layer, own_subspace, random_subspace, scaling, scaling_policy
from csulora.correction.controls.comparison import compared
from csulora.correction.controls.safe_lora import cosines, safe_lora
from csulora.correction.controls.subspaces import other_layers, own_subspaces, random_subspaces, truncated

__all__ = [
    "compared",
    "cosines",
    "other_layer",
    "other_layers",
    "own_subspace",
    "own_subspaces",
    "random_subspace",
    "random_subspaces",
    "safe_lora",
    "scaling",
    "scaling_policy",
    "truncated",
]
