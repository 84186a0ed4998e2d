"""``python -m csulora``."""

from csulora.cli.app import main

main()
