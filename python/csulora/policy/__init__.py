"""Policies: what to keep of an adapter and what to refuse."""
