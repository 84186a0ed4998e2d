"""vLLM's own loading function on an adapter of Llama-3-8B's shape: corrected, or raw and through `Admission`.

Run by vllm_load.py. Prints one line, RESULTS and JSON.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

import csulora
from csulora.serving.admission import Admission, Terms
from csulora.serving.gate import Gate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import measuring
import shapes


def load(path: Path) -> LoRAModel:
    """Load a directory as vLLM's worker does."""
    targets = {name.rpartition(".")[2] for name in shapes.SHAPES["llama-3-8b"].modules()}
    helper = PEFTHelper.from_local_dir(str(path), None)
    return LoRAModel.from_local_checkpoint(str(path), targets, helper, device="cpu", dtype=torch.bfloat16)


def main() -> None:
    """Time loads in turn."""
    shape, repetitions = shapes.SHAPES["llama-3-8b"], int(sys.argv[1])
    terms = Terms(torch.bfloat16, shapes.RANK)
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        subspace = shapes.make_subspace(shape, work / "subspace.safetensors")
        raw = shapes.make_adapter(shape, work / "raw", torch.bfloat16)
        fixed, _ = csulora.correct(csulora.load_adapter(raw), subspace, csulora.Policy.csulora())
        csulora.save_adapter(fixed, work / "corrected")
        admission = Admission(Gate(subspace, csulora.Policy.csulora()))
        numbers = itertools.count()
        config = json.loads((raw / "adapter_config.json").read_text())

        def guarded() -> None:
            number = next(numbers)  # with another scale, so that nothing made before is found again
            (raw / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16 + number}))
            directory = admission.admit(number, lambda: raw, terms, reload=False)
            load(directory)
            shutil.rmtree(directory)

        times = measuring.interleaved({"plain": lambda: load(work / "corrected"), "guarded": guarded}, repetitions)
    ratio = times["guarded"]["median"] / times["plain"]["median"]
    print("RESULTS", json.dumps({"seconds": times, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
