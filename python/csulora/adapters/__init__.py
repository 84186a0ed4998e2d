"""LoRA adapters: their in-memory form, and one package per file format."""
