"""Asks one engine in this process, plain or guarded, and prints JSON.

    python tests/sglang/engine.py REQUEST.json

The request says which of the two, and names the model and the adapters.
"""

import json
import shutil
import sys
from pathlib import Path

from options import ENGINE

PROMPT = [2, 5, 9, 17, 30, 41]
OPTIONS = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}


def answer(engine, adapter: str | None) -> dict[str, list]:
    found = engine.generate(input_ids=PROMPT, sampling_params=OPTIONS, lora_path=adapter, return_logprob=True)
    steps = found["meta_info"]["output_token_logprobs"]
    return {"tokens": [token for _, token, _ in steps], "logprobs": [logprob for logprob, _, _ in steps]}


def load(engine, name: str, path: str | Path) -> str:
    result = engine.load_lora_adapter(name, str(path))
    return "" if result.success else result.error_message


def plain(engine, request: dict) -> dict:
    results = {"base": answer(engine, None)}
    for kind in ("raw", "corrected"):
        for name, path in request[kind].items():
            assert load(engine, f"{kind}-{name}", path) == ""
            results[f"{kind}-{name}"] = answer(engine, f"{kind}-{name}")
    return results


def attempt(action) -> str:
    try:
        result = action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return str(getattr(result, "error_message", "")) or "let through"


def guarded(engine, request: dict) -> dict:
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    one, two = request["raw"].values()
    results = {"base": answer(engine, None), "static": answer(engine, "static")}
    upload = shutil.copytree(two, Path(sys.argv[1]).with_name("deleted"))
    results["load"] = load(engine, "two", upload)
    results["two"] = answer(engine, "two")
    shutil.rmtree(upload)
    results["load third"] = load(engine, "third", one)  # evicts one of the two
    results["third"] = answer(engine, "third")
    results["static after eviction"] = answer(engine, "static")
    results["two after eviction"] = answer(engine, "two")
    results["refused"] = {name: load(engine, name, path) for name, path in request["bad"].items()}
    results["missing"] = load(engine, "missing", "/nowhere")
    raw = LoadLoRAAdapterReqInput(lora_name="rpc", lora_path=one, lora_id="rpc")
    engine.collective_rpc("load_lora_adapter", recv_req=raw)  # which drops the answer
    results["after rpc"] = attempt(lambda: engine.generate(input_ids=PROMPT, sampling_params=OPTIONS, lora_path="rpc"))
    results["tensors"] = attempt(lambda: engine.load_lora_adapter_from_tensors("tensors", [], {}))
    results["base after"] = answer(engine, None)
    return results


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    static = {}
    if request["what"] == "guarded":
        from csulora.hooks import sglang as hook

        hook.activate()
        static = {"lora_paths": [f"static={request['raw']['one']}"]}
    import sglang

    engine = sglang.Engine(model_path=request["model"], log_level="error", **ENGINE, **static)
    results = {"plain": plain, "guarded": guarded}[request["what"]](engine, request)
    print("RESULTS", json.dumps(results), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
