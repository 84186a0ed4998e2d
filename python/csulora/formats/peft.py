"""Placeholder while the PEFT format is being written."""
