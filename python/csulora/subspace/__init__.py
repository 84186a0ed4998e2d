"""Subspaces of a model pair, and the inputs that a correction is limited to."""
