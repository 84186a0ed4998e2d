"""`csulora guard`: whatever appears in one directory appears corrected in another, or the reason why it does not.

For servers without a hook of their own: uploads go to INCOMING, and the server is pointed at OUTGOING.

    INCOMING/name        an adapter directory, or a file ``name.gguf``
    OUTGOING/name        the corrected adapter in the same format, complete
    OUTGOING/name.refused.json    or, instead of it, why there is none

What was decided is recorded beside the result: the hash of the input and the fingerprint of subspace file, policy and
version. After a restart, an input whose record still holds is left alone. Names that begin with a dot, and files
that are no GGUF, are ignored.

Whatever one upload does, the next is decided on. What this machine fails to do (a full disk, a log that cannot be
written) is tried again, at longer and longer intervals.
"""

from csulora.serving.guard.options import Options
from csulora.serving.guard.service import DirectoryGuard

__all__ = ["DirectoryGuard", "Options"]
