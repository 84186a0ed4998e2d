import sys

import pytest

from commands import Outcome, Run
from csulora.cli import app


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command, its words separated by spaces, in this process; further arguments may hold spaces."""

    def run(command: str, *further: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["csulora", *command.split(), *map(str, further)])
        with pytest.raises(SystemExit) as exit:
            app.main()
        return Outcome(int(exit.value.code or 0), *capsys.readouterr())

    return run
