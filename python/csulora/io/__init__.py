"""Files of every kind, written complete or not at all and read within bounds."""
