"""Adapters of mlx-lm."""
