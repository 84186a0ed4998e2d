"""From two checkpoints to a subspace, and its verification."""
