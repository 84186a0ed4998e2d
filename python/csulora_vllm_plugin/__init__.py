"""The entry point by which vLLM finds csulora's guard; it imports nothing.

vLLM only logs an error that comes up while it imports a plugin's module, and then serves without the plugin. An
error that the plugin's function raises stops vLLM. So everything that can fail is inside the function.
"""


def activate() -> None:
    """Guard this process; called by vLLM once in every process."""
    from csulora.hooks import vllm

    vllm.activate()
