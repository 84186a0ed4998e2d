"""One package per host, with only what is peculiar to it; what to let through, `csulora.serving.gate` decides."""
