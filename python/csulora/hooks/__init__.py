"""One module per host. A hook holds only what is peculiar to its host."""
