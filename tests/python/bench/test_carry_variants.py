"""What is tried for carrying over: gains shared by layer, and how a weight is chosen and a row is told."""

import carry_variants
import torch


def row(attack: float, task: float) -> dict:
    raw, point = {"attack": 1.0, "task": 0.5, "elsewhere": 1.0}, {"attack": attack, "task": task, "elsewhere": 0.9}
    return {"seed": 5, "variant": "as now", "adapters": [{"raw": raw, "point": point}]}


def test_modules_of_a_layer_share_their_gains() -> None:
    names = [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    gains = carry_variants.SharedByLayer(names, directions=3)
    start = gains.start()
    assert start.shape == (2, 3, 3)
    found = gains.gains(start + torch.arange(2.0)[:, None, None])
    assert found.shape == (4, 3, 3)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[1], found[2])


def test_what_is_kept_is_relative_to_the_raw_adapter_and_what_is_left_is_not() -> None:
    found = row(attack=0.25, task=0.4)
    assert [carry_variants.kept(found, kind) for kind in ("attack", "task", "elsewhere")] == [[0.25], [0.8], [0.9]]
    assert carry_variants.table([found]).endswith("| 5 | as now | 0.25 / 0.25 | 0.80 / 0.80 | 0.90 / 0.90 |")
