"""Checkpoints, and the names and layouts of model families."""
