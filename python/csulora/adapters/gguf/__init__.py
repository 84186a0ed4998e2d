"""GGUF LoRA files."""
