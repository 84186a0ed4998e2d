import signal
import subprocess
import sys

import pytest

from csulora.cli import exit_codes


def test_ctrl_c_ends_a_long_computation_within_a_second() -> None:
    """The main thread computes for much longer than that, and no Python code runs meanwhile."""
    script = (
        "import signal, torch; from csulora import native\n"
        "from csulora.cli import interruption\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "base, options = torch.randn(4000, 4000), native._core.ExtractOptions()\n"
        "options.rank = 4000\n"  # all of them take a full decomposition
        "with interruption.interruptible('so it was'):\n"
        "    print('computing', flush=True)\n"
        "    native._core.extract_subspace(base, base + torch.randn(4000, 4000), options)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"computing\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == exit_codes.INTERRUPTED
    assert message == b"csulora: interrupted: so it was\n"
