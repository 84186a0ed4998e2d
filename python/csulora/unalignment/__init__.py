"""A briefly un-aligned copy of a model, of which nothing but its subspace is ever written."""
