"""The one name that SGLang imports."""


def rotary_embedding(*args: object) -> None:
    """Fail if SGLang does call it."""
    raise NotImplementedError("SGLang called a kernel that it does not call on a CPU")
