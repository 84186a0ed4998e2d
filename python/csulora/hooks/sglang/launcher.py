"""`csulora sglang-serve`: SGLang's server, or an error if it would not be guarded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from csulora.hooks.sglang import activate
from csulora.serving.gate import Gate


def serve(arguments: Sequence[str]) -> None:
    """Run SGLang's HTTP server with these arguments in this process, guarded.

    Raises:
        HostError: SGLang is not of a version that is known, the arguments ask for what is not covered, or a scheduler
            does not say that it is guarded.
        CsuloraError: the subspace file or the policy cannot be used.
    """
    Gate.from_environment(route="sglang")  # fails in a second, and importing SGLang takes ten
    activate()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from csulora.hooks.sglang.front_end import check_arguments

    try:
        server_args = prepare_server_args(list(arguments))
        server_args.resolve_once()
        check_arguments(server_args)
        launch_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
