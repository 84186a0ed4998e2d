"""Coverage-guided fuzzing of everything that reads a file somebody else made.

    python tests/fuzz/fuzz.py TARGET [--seconds 60] [--random-seed 0] [--found DIR]      # one target, see targets.py
    python tests/fuzz/fuzz.py --seeds                                                    # start the corpus afresh

Bounds: an input of at most 64 KiB may take 10 seconds, and 1 GiB for the whole process. Inputs that reach new code
are collected in --found; those worth keeping belong into tests/fuzz/corpus/TARGET, which `make test` replays.
"""

import argparse
import functools
import inspect
import json
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
LONGEST_INPUT = 1 << 16  # bytes
SECONDS_PER_INPUT, MEMORY = 10, 1024  # s, MiB

sys.path[:0] = [str(HERE), str(HERE.parent / "python")]
import targets  # noqa: E402 - beside this file
import torch  # noqa: E402

from csulora.adapters.peft import config as peft_config  # noqa: E402
from csulora.adapters.peft import patterns  # noqa: E402

WORDS = {
    "adapter_config": sorted(peft_config.KNOWN_FIELDS),
    "experts": ["base_layer", "experts", ".0.", "gate_proj", "lora_embedding_A", "data_offsets", "BF16"],
    "experts_config": [*sorted(peft_config.KNOWN_FIELDS), "mlp.experts.gate_up_proj", *peft_config.COLUMN_ORDERS],
    "gguf": ["GGUF", "general.architecture", "general.alignment", "adapter.lora.alpha", "qwen2", "gemma3", ".lora_a"],
    "policy": ["penalties", "gains", "match", "inf", "nan", "exact", "uncovered", "max_undo", "directions", "left"],
    "safetensors": ["F16", "BF16", "F8_E4M3", "F4", "lora_embedding_A", "data_offsets", "__metadata__"],
    "subspace": ["csulora", "certificate", "aliases", "fingerprints", "format", "base_sha256", "BF16"],
    "prompts": ["messages", "role", "content", "prompt", "system", "user", "assistant"],
}


def main() -> None:
    """Fuzz one target until its time is up; libFuzzer ends the process, with 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=sorted(targets.TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--random-seed", type=int, default=0, help="0: another one every time")
    parser.add_argument("--found", type=Path, help="directory for inputs that reach new code")
    parser.add_argument("--seeds", action="store_true", help="write the good files that the corpus starts from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seeds:
        write_seeds()
    else:
        found = arguments.found or Path(tempfile.mkdtemp())
        fuzz(arguments.target, arguments.seconds, arguments.random_seed, found)


def write_seeds() -> None:
    """Write the good files of every kind into the corpus."""
    for target, files in targets.seeds().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (CORPUS / target / name).write_bytes(data)


def instrument() -> None:
    """Make csulora's functions report coverage; an editable install's are not seen when they are imported."""
    seen: set[int] = set()
    pending: list[object] = [module for name, module in sys.modules.items() if name.partition(".")[0] == "csulora"]
    while pending:
        for value in list(vars(pending.pop()).values()):
            value = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
            ours = str(getattr(value, "__module__", "")).startswith("csulora") and id(value) not in seen
            seen.add(id(value))
            if ours and isinstance(value, type):
                pending.append(value)
            elif ours and isinstance(value, types.FunctionType):
                atheris.instrument_func(inspect.unwrap(value))


def run_once(target: str, data: bytes) -> None:
    """Run a target; libFuzzer takes no answer but None."""
    targets.survives(target, data)


def remembered(match: Callable[..., list[patterns.Row]]) -> Callable[..., list[patterns.Row]]:
    """Keep what the process beside this one found: starting it takes a hundred times as long as everything else."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[patterns.Row]] = {}

    def match_apart(
        self: patterns.Matcher, keys: Sequence[str], names: Sequence[str], group: str
    ) -> list[patterns.Row]:
        asked = (tuple(keys), tuple(names), group)
        if asked not in found:
            found[asked] = match(self, keys, names, group)
        return found[asked]

    return match_apart


def fuzz(target: str, seconds: int, random_seed: int, found: Path) -> None:
    """Run libFuzzer."""
    instrument()
    patterns.Matcher._match_apart = remembered(patterns.Matcher._match_apart)
    found.mkdir(parents=True, exist_ok=True)
    words = Path(tempfile.mkdtemp()) / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS.get(target, ())))
    options = [
        f"-max_total_time={seconds}",
        f"-seed={random_seed}",
        f"-max_len={LONGEST_INPUT}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MEMORY}",
        f"-artifact_prefix={found.parent}/finding-{target}-",
        "-print_final_stats=1",
        "-verbosity=0",
        f"-dict={words}",
    ]
    of_json = {"adapter_config", "safetensors", "experts_config", "experts", "subspace"}
    mutate = _mutate_json if target in of_json else None
    atheris.Setup(
        [sys.argv[0], *options, str(found), str(CORPUS / target)],
        functools.partial(run_once, target),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def _mutate_json(data: bytes, longest: int, seed: int) -> bytes:
    """Change one value of a JSON object, and every other time any bytes: most byte changes only break the syntax."""
    choices = atheris.FuzzedDataProvider(seed.to_bytes(8, "little") * 8)
    try:
        document = json.loads(data) if choices.ConsumeBool() else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not document:
        return bytes(atheris.Mutate(data, longest))
    key = choices.PickValueInList(sorted(document))
    value = choices.PickValueInList([document, document[key]] if isinstance(document[key], dict) else [document])
    if value is document or not value:
        value, inner = document, key
    else:
        inner = choices.PickValueInList(sorted(value))
    odd = [None, True, 0, -1, 1, 1e308, 2**63, "", "q_proj", [], {}, [0, 1], [[]], {"": 0}, value[inner]]
    change = choices.ConsumeIntInRange(0, 3)
    if change == 0:
        del value[inner]
    elif change == 1:
        value[choices.PickValueInList([*value, "format", "unknown"])] = value[inner]
    elif change == 2 and isinstance(value[inner], int):
        value[inner] += choices.ConsumeIntInRange(-2, 2)
    else:
        value[inner] = choices.PickValueInList(odd)
    return json.dumps(document).encode()[:longest]


if __name__ == "__main__":
    main()
