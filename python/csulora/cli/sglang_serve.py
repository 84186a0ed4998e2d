"""`csulora sglang-serve`: SGLang's server, guarded."""

from __future__ import annotations

import typer

from csulora.cli.arguments import (
    RequireRulesSignature,
    RequireSignature,
    ServedDecisions,
    ServedPolicy,
    ServedSubspace,
    set_variables,
)


def sglang_serve(
    context: typer.Context,
    subspace: ServedSubspace = None,
    policy: ServedPolicy = None,
    decisions: ServedDecisions = None,
    require_signature: RequireSignature = None,
    require_rules_signature: RequireRulesSignature = None,
) -> None:
    """Run SGLang's HTTP server with all further arguments, or fail if adapters would not be corrected."""
    from csulora.hooks.sglang.launcher import serve

    set_variables(subspace, policy, decisions, require_signature, require_rules_signature)
    serve(context.args)
