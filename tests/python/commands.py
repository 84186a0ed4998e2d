"""What commands that tests run in this process end with; the fixture is in cli/conftest.py."""

from typing import NamedTuple, Protocol


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Run(Protocol):
    def __call__(self, command: str, *further: object) -> Outcome: ...
