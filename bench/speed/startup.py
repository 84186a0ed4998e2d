"""How long `csulora --help` takes beside `python -c 'import torch'`, which no command may need before it runs.

    python bench/speed/startup.py [--repetitions 9] [--json FILE]

Both run in turn in one session; the ratio is that of their medians. Exits with 1 above 0.25.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from measuring import machine

COMMANDS = {
    "csulora --help": [sys.executable, "-m", "csulora", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}
MOST = 0.25


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repetition in range(arguments.repetitions + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repetition:  # the first reads files from disk
                seconds[name].append(time.perf_counter() - start)
    medians = {name: median(found) for name, found in seconds.items()}
    ratio = medians["csulora --help"] / medians["import torch"]
    for name, found in medians.items():
        print(f"{name}: {found:.2f} s")
    print(f"ratio of medians: {ratio:.2f}")
    if arguments.json:
        document = {"machine": machine(), "repetitions": arguments.repetitions, "seconds": medians, "ratio": ratio}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(0 if ratio <= MOST else 1)


if __name__ == "__main__":
    main()
