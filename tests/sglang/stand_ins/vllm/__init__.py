"""Not vLLM: see sitecustomize.py."""
