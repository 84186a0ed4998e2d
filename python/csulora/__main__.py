"""``python -m csulora``."""

from csulora.cli import main

main()
