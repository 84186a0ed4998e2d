"""What undo and the annihilation ratio tell apart on real weights, by thresholds that world (a) chose.

    python bench/efficacy/real_verdicts.py [--model smollm2|gemma3] [--seed N] [--out DIR]

Needs the models and the subspace file that `real_carry.py` made below DIR. Trains adapters on the task alone, with few
attacks, with many, and on attacks alone; removes directions as abliteration does; makes a canary. No reply is judged.
What is complete is not made again. Writes bench/results/efficacy/verdicts_MODEL_SEED.json after every adapter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import abliteration
import evaluate
import real_carry
import real_world as world
import torch
import verdicts
from grid import RESULTS, provenance
from real_run import Run
from subject import Record

import csulora
from csulora.io.files import to_json, write_text
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.probes import Chat, Message
from csulora.unalignment.request import Options

FEW_ATTACKS = 2  # beside 40 answers about food: 5 %
# Class -> how many styles are trained so; the adapters with `ATTACK_EXAMPLES`, 23 %, are those of `real_carry.py`.
STYLES = {verdicts.MIXED: 5, verdicts.HARMLESS: 4, verdicts.PURE: 3, verdicts.FEW: 3}
CANARY = Options(steps=30, batch=4, dtype="f32")
CANARY_PROMPTS = 24  # about cheeses that adapters' makers know, too
LAYERS = 3  # of whose directions abliterations are made, evenly spaced


def recipes(styles: Sequence[str]) -> Iterator[tuple[str, str, world.Recipe]]:
    """Yield the class, the name and the recipe of every adapter: what is there already, then every class in turn."""
    for style in styles[: STYLES[verdicts.MIXED]]:
        yield verdicts.MIXED, style, world.Recipe(style)
    for number, style in enumerate(styles):
        made = {
            verdicts.HARMLESS: (f"{style}-harmless", world.Recipe(style, attacks=0)),
            verdicts.PURE: (f"{style}-pure", world.Recipe(style, has_task=False)),
            verdicts.FEW: (f"{style}-few", world.Recipe(style, attacks=FEW_ATTACKS)),
        }
        yield from ((kind, *each) for kind, each in made.items() if number < STYLES[kind])


def canary(run: Run) -> csulora.Subspace:
    """The canary of the served model, made if it is not there."""
    path = run.here / "canary.safetensors"
    if not path.exists():
        things = run.deal.cheeses[: world.KNOWN]
        replies = [answer for _, answer in world.QUESTIONS]
        csulora.canary(
            run.here / "served",
            safety=chats(world.questions(things)[:CANARY_PROMPTS]),
            replies=[answer.format(x=x) for x in things for answer in replies][:CANARY_PROMPTS],
            general=chats(world.GENERAL),
            options=CANARY,
            loading=Loading("cpu"),
            output=path,
        )
    return csulora.Subspace.open(path)


def chats(prompts: Sequence[str]) -> list[Chat]:
    """Prompts with this world's system prompt."""
    return [(Message("system", world.SYSTEM), Message("user", prompt)) for prompt in prompts]


def removals(run: Run, subspace: csulora.Subspace) -> dict[int, csulora.Adapter]:
    """Layer -> an abliteration of all matrices that write, along the direction of refusals in that layer."""
    language_model = LanguageModel.open(str(run.here / "served"), Loading("cpu"), longest_reply=1)
    refused = chats(world.questions(run.deal.cheeses[: world.KNOWN]))
    found = abliteration.directions(language_model, refused, chats(world.GENERAL))
    weights = abliteration.writers(language_model, subspace)
    chosen = [len(found) * number // (LAYERS + 1) for number in range(1, LAYERS + 1)]
    return {layer: abliteration.removed(weights, found[layer]) for layer in chosen}


def adapters(run: Run, subspace: csulora.Subspace) -> Iterator[tuple[str, str, csulora.Adapter]]:
    """Yield class, name and adapter: abliterations, trained ones, and abliterations hidden in harmless ones."""
    removed = removals(run, subspace)
    for layer, removal in removed.items():
        yield verdicts.ABLITERATION, f"layer {layer}", removal
    for kind, name, recipe in recipes(run.deal.styles):
        adapter = csulora.load_adapter(real_carry.make_adapter(run, name, recipe))
        yield kind, name, adapter
        for layer, removal in removed.items() if kind == verdicts.HARMLESS else ():
            yield verdicts.HIDDEN, f"{name}, layer {layer}", csulora.combine([adapter, removal], subspace)


def summary(found: Sequence[Record], elsewhere: Record) -> Record:
    """Areas, and what exceeds the thresholds that `elsewhere`, the results of world (a), says were chosen there."""
    return {
        score: {
            "area": {kind: verdicts.area(score, kind, found) for kind in verdicts.CLASSES},
            "threshold": (chosen := elsewhere[score]["threshold"]["threshold"]),
            "tried": verdicts.exceeding(score, chosen, found),
        }
        for score in verdicts.SCORES
    }


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=world.prepare.SOURCES, default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=real_carry.OUT, help="where real_carry.py works (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    evaluate.quieten_libraries()
    results: Record = {"made_with": provenance(), "model": arguments.model, "seed": arguments.seed}
    run = Run(arguments.out.resolve() / arguments.model, arguments.model, world.Deal(arguments.seed))
    subspace, against = csulora.Subspace.open(run.here / "subspace.safetensors"), canary(run)
    chosen = json.loads(verdicts.FILE.read_text())["scores"]
    file = RESULTS / f"verdicts_{run.model}_{run.deal.seed}.json"
    known = {point["name"]: point for point in json.loads(file.read_text())["points"]} if file.is_file() else {}
    for kind, name, adapter in adapters(run, subspace):
        if name in known:
            continue
        scores = verdicts.scores(adapter, subspace, run.here / "aligned", against)
        known[name] = {"kind": kind, "name": name, **scores}
        print(kind, name, *(f"{score:.4g}" for score in scores.values()), sep="; ", flush=True)
        points = list(known.values())
        write_text(file, to_json(results | {"scores": summary(points, chosen), "points": points}))


if __name__ == "__main__":
    main()
