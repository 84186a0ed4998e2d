"""The one table of numeric tolerances, relative to the Frobenius norm of what is compared."""

import torch

COMPUTED = {
    # The core's factors are float32: a few products of length <= 4096 accumulate some 2^-24 each.
    torch.float32: 1e-5,
}

STORED = {
    # Rounding b and a once each moves b a by at most two units in the last place of the storage type.
    torch.float32: 2**-22,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}

# A kept component that is a thousandth of the update carries a thousand times the error of its float32 factors.
CANCELLED = 1e-3

# Columns of a basis rounded to the storage type are orthonormal to about its unit roundoff.
PROJECTOR = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}

# Energies and undo are float64 sums over float32 factors.
TRACES = 1e-6

# The smallest float32: what a factor below 2^-126, where digits end, is stored to.
SMALLEST = 2.0**-149
