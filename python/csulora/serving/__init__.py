"""What stands between adapters and a server: the gate, its decisions, and the directory guard."""
