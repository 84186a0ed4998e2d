"""The command line: one module per command, assembled here.

No command imports torch before its arguments are known to be right, so that help and usage errors come at once.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, NoReturn

import typer

import csulora
from csulora.cli import exit_codes
from csulora.cli.adjust import adjust
from csulora.cli.canary import canary
from csulora.cli.correct import correct
from csulora.cli.doctor import doctor
from csulora.cli.evaluate import evaluate
from csulora.cli.export import export
from csulora.cli.extract import extract
from csulora.cli.guard import guard
from csulora.cli.inspect import inspect
from csulora.cli.sglang_serve import sglang_serve
from csulora.cli.tune import tune
from csulora.cli.verify import verify
from csulora.cli.vllm_serve import vllm_serve
from csulora.errors import CsuloraError, RefusedError, printable

app = typer.Typer(
    name="csulora",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"csulora {csulora.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Correct trained LoRA adapters so that a model's safety alignment survives them."""


for command in (extract, canary, verify, inspect, correct, export, tune, adjust, evaluate, guard):
    app.command()(command)
for server in (vllm_serve, sglang_serve):
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(server)
app.command()(doctor)


def main() -> None:
    """Run the command line; every error csulora raises becomes one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        app(prog_name="csulora")
    except RefusedError as error:
        _fail("refused", error, exit_codes.REFUSED)
    except (CsuloraError, OSError) as error:
        _fail("error", error, exit_codes.BAD_INPUT)


def _fail(kind: str, reason: object, code: int) -> NoReturn:
    print(f"csulora: {kind}: {printable(reason)}", file=sys.stderr)
    sys.exit(code)
