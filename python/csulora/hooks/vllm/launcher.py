"""`csulora vllm-serve`: vLLM's server, or an error if it would not be guarded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from csulora.errors import HostError
from csulora.hooks.hosts import VLLM
from csulora.hooks.vllm import ENTRY_POINT, activate
from csulora.serving.gate import Gate

_GROUP = "vllm.general_plugins"


def serve(arguments: Sequence[str]) -> None:
    """Run ``vllm serve`` with these arguments in this process, guarded.

    The other processes find the guard as a plugin; before anything is served, each is asked whether it did.

    Raises:
        HostError: they would not find it, or did not.
        CsuloraError: the subspace file or the policy cannot be used.
    """
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and ENTRY_POINT not in plugins.split(","):
        raise HostError(f"VLLM_PLUGINS is {plugins!r}, which leaves csulora out; add {ENTRY_POINT} or unset it")
    if not any(found.name == ENTRY_POINT for found in entry_points(group=_GROUP)):
        raise HostError(f"csulora is not installed as a plugin of vLLM ({_GROUP}); reinstall it")
    Gate.from_environment(route="vllm")  # fails in a second, and importing vLLM takes ten
    activate()
    from vllm import __version__
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup = VLLM.check(__version__).function("cli_env_setup")

    # What the command `vllm` does; it also asks for the version of a distribution that on CPUs has another name.
    sys.argv = ["vllm", "serve", *arguments]
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="csulora vllm-serve")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(sys.argv[1:])
    command.validate(parsed)
    if parsed.grpc:
        raise HostError("vLLM's gRPC server does not ask its processes whether csulora guards them; leave --grpc out")
    command.cmd(parsed)
