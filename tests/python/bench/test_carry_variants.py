"""What is tried for carrying over: in which directions, and of which gains."""

import carry_variants
import torch

import factories


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


def test_directions_of_both_keep_the_first_triples_and_are_orthonormal() -> None:
    known, added = factories.subspace(rank=3), factories.subspace(rank=2, seed=50)
    for name, module in carry_variants.together(known, added).items():
        first, other = known[name], added[name]
        for side in (module.u, module.v):
            assert torch.allclose(side.T @ side, torch.eye(5), atol=1e-5)
        assert torch.equal(module.s, torch.cat([first.s, other.s]).sort(descending=True).values)
        within = first.u.T @ (module.u * module.s) @ module.v.T @ first.v
        assert torch.allclose(within, first.s.diag(), atol=1e-4)
        assert ((module.u.T @ other.u).norm(dim=0) > 0.999).all()
