"""What is tried for carrying over: in which directions, and of which gains."""

import carry_variants
import torch


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
