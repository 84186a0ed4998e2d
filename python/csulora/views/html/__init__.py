"""The page of ``csulora inspect --html``."""
