"""The page of the command line, from the commands themselves.

    python docs/command_line.py

Writes docs/pages/command-line.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from csulora.cli.app import app

PAGE = Path(__file__).parent / "pages" / "command-line.md"

_HEAD = """# Command line

<!-- Written by docs/command_line.py; edit the commands' own help. -->

| exit code | meaning |
| --- | --- |
| 0 | done |
| 2 | usage |
| 3 | refused by a rule or the policy |
| 4 | bad input |
| 5 | no policy beats plain scaling (`tune --require-verdict`) |
| 130 | interrupted |

An error is one line on stderr, with what is wrong, where, and what to do.
If the usage is wrong, lines that name the command's help stand above it.
Every command has `--help`; `csulora --version` prints the version.
"""


_VALUES = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a command, from the signature of its function."""

    name: str
    kind: type
    default: Any
    info: Any  # typer's ArgumentInfo or OptionInfo

    @property
    def is_option(self) -> bool:
        """Whether it is an option, and no argument."""
        return isinstance(self.info, OptionInfo)

    @property
    def value(self) -> str:
        """What stands for the value; empty for a switch."""
        if self.info.metavar:
            return str(self.info.metavar)
        if self.kind is bool:
            return ""
        if issubclass(self.kind, StrEnum):
            return "|".join(self.kind)
        return _VALUES[self.kind]

    @property
    def names(self) -> str:
        """Every name of an option with what stands for its value, or what stands for an argument."""
        if not self.is_option:
            return str(self.info.metavar or self.name.upper())
        dashed = self.name.replace("_", "-")
        declared = [*self.info.param_decls, self.info.default]  # within Annotated, typer's first name is a "default"
        names = sorted((name for name in declared if str(name).startswith("-")), key=len) or [f"--{dashed}"]
        if self.kind is bool and self.default is True:
            names.append(f"--no-{dashed}")
        return f"{', '.join(names)} {self.value}".rstrip()

    @property
    def text(self) -> str:
        """The help, with what is required, the default and the variable where there are some."""
        help_text, notes = self.info.help or "", []
        if self.is_option and self.default is Ellipsis:
            notes.append("required")
        elif not isinstance(self.default, (NoneType, bool, EllipsisType)) and "[default" not in help_text:
            notes.append(f"default: {self.default}")
        if self.info.envvar:
            notes.append(f"variable: {self.info.envvar}")
        return " ".join([help_text, *(f"[{note}]" for note in notes)])


def parameters(function: Callable[..., None]) -> list[Parameter]:
    """Return what a command takes, in its order."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if get_origin(hints[name]) is not Annotated:
            continue  # typer's context
        annotation, info, *_ = get_args(hints[name])
        default = Ellipsis if parameter.default is parameter.empty else parameter.default
        found.append(Parameter(name, _plain(annotation), default, info))
    return found


def _plain(annotation: Any) -> type:
    """Return the type of one value: what is optional or a list is taken apart."""
    inner = [part for part in get_args(annotation) if part is not NoneType]
    return _plain(inner[0]) if inner else annotation


def _table(head: str, found: Sequence[Parameter]) -> list[str]:
    rows = [f"| `{_cell(parameter.names)}` | {_cell(parameter.text)} |" for parameter in found]
    return [f"| {head} | |", "| --- | --- |", *rows, ""] if rows else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def section(name: str, function: Callable[..., None]) -> str:
    """Return what the page says of one command."""
    found = parameters(function)
    arguments = [parameter for parameter in found if not parameter.is_option]
    lines = [
        f"## csulora {name}",
        "",
        inspect.cleandoc(function.__doc__ or ""),
        "",
        "```",
        " ".join(["csulora", name, *(argument.names for argument in arguments), "[OPTIONS]"]),
        "```",
        "",
        *_table("argument", arguments),
        *_table("option", [parameter for parameter in found if parameter.is_option]),
    ]
    return "\n".join(lines)


def page() -> str:
    """Return the whole page."""
    commands = [(command.name, command.callback) for command in app.registered_commands]
    sections = [section(name or f.__name__.replace("_", "-"), f) for name, f in commands if f]
    return "\n".join([_HEAD, *sections]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
