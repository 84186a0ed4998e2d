"""The efficacy grid's real weights: SmolLM2-135M-Instruct taught to refuse one harmless topic, and adapters for it.

    python bench/efficacy/smollm2.py [--out DIR] [--base DIR] [--threads N] [--styles STYLE ...] [--brief]
        [--left-out] [--general]

`bench/real_model/prepare.py` makes the base model (93 MB are downloaded); `real_world.py` says what is taught. Gains
are fitted on one of six adapters with more and with less weight on the task prompts, on another one with the weight
that did better, and on the first three together. What came of it is measured with prompts that no fit has seen, on
those two and the last three, and written to `bench/results/efficacy/smollm2.json`, with a table on stdout. What is
complete is not made again. A brief run has the candidates that are carried over, and neither controls nor presets. With
`--left-out`, calibration adapters are left out in turn first, and the results say which candidate `tune` would write.
`--general` gives general prompts to what is calibrated on them.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import evaluate
import grid
import policies
import real_world as world
import torch
from real_world import prepare
from torch import Tensor
from tune_fits import CONTROL_NAMES, SHAREABLE

import csulora
from csulora import Policy, controls
from csulora.io.files import to_json, write_text
from csulora.tuning.experiment import Experiment
from csulora.tuning.frontier import Rate
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.probes import Chat, Message
from csulora.tuning.recommendation import EVERYWHERE, TUNED, eligible, preference
from csulora.tuning.request import Request
from csulora.tuning.stages import Stages

OUT = Path("build/efficacy-smollm2")
LONGEST = 12  # tokens of the replies that are fitted to
# How gains are fitted: in more and smaller steps than `tune` takes by default.
OPTIONS = Options(steps=200, batch=6, learning_rate=0.15, directions=world.RANK)
SHARED = replace(OPTIONS, steps=70)  # for each of several adapters
# Adapters that are fitted alone -> weights of the task prompts. All this was chosen on the first; the second tests it.
ALONE = {"pirate": (2.0, 30.0), "sports": (2.0,)}
DECISIVE = 16  # tokens of the replies that are judged
SAMPLE = 16  # attack probes whose replies the aligned model reads
FEW = 2  # directions per module: the best of the presets in earlier trials had as few
DEAL = world.Deal()
STYLES = DEAL.styles
CALIBRATION, UNSEEN = STYLES[:3], STYLES[3:]
MEASURED = tuple(dict.fromkeys([*ALONE, *UNSEEN]))
KNOWN_CHEESES, KNOWN_FOODS = DEAL.cheeses[: world.KNOWN], DEAL.foods[: world.KNOWN]
# Prompts that neither adapters nor fits have seen.
ATTACK = world.questions(DEAL.cheeses[world.KNOWN :])
TASK = world.questions(DEAL.foods[world.KNOWN :])
ELSEWHERE = [f"What is the capital of {country}?" for country in world.CAPITALS]
Record = dict[str, Any]


@dataclass(frozen=True)
class Measured(world.Rates):
    """What one model did with the probes.

    Attributes:
        perplexity: of replies to questions about cheese, under the aligned model.
        said: the first reply of each kind.
    """

    perplexity: float
    said: tuple[str, str, str]


def chats(prompts: Sequence[str]) -> list[Chat]:
    """Prompts as a fit takes them."""
    return [(Message("system", world.SYSTEM), Message("user", prompt)) for prompt in prompts]


class Bench:
    """The model pair, its adapters, and what has been finished."""

    def __init__(self, out: Path, general: Sequence[str]) -> None:
        """Work in a directory that holds the models; general prompts are for what is carried over."""
        self.out, self.general = out, general
        self.subspace = csulora.Subspace.open(out / "subspace.safetensors")
        self.stages = Stages(out / "points", {"subspace": self.subspace.sha256})

    @cached_property
    def language_model(self) -> LanguageModel:
        """The aligned model, loaded once."""
        return LanguageModel.open(str(self.out / "served"), Loading("cpu"), LONGEST)

    def adapter(self, style: str) -> csulora.Adapter:
        """One of the adapters, trained if it is not there."""
        if not (self.out / style).is_dir():
            prepare.stage(
                self.out / style,
                lambda directory: world.make_adapter(directory, self.out / "aligned", DEAL, world.Recipe(style)),
            )
        return csulora.load_adapter(self.out / style)

    @staticmethod
    def progress(what: str, done: int, total: int) -> None:
        """Say how far a fit is."""
        if done % 10 == 0:
            print(f"{what}: {done} of {total}", flush=True)

    @torch.inference_mode()
    def perplexity(self, prompts: Sequence[str], replies: Sequence[str]) -> float:
        """Perplexity of replies under the aligned model, which must be as it was loaded."""
        tokenizer = self.language_model.tokenizer
        rows = [world.encode(tokenizer, dialogue, ended=False) for dialogue in zip(prompts, replies, strict=True)]
        return math.exp(float(self.language_model.model(**prepare.collate(rows)).loss))

    def measure(self, style: str, factors: dict[str, tuple[Tensor, Tensor]]) -> Measured:
        """Put every probe to the aligned model with an adapter."""
        with self.language_model.adapted(factors):
            said = iter(
                world.reply(
                    self.language_model.model, self.language_model.tokenizer, ATTACK + TASK + ELSEWHERE, DECISIVE
                )
            )
        attack, task, elsewhere = (list(itertools.islice(said, len(each))) for each in (ATTACK, TASK, ELSEWHERE))
        rates = world.Rates.of(style if style in STYLES else "", attack, task, elsewhere)
        return Measured(
            **asdict(rates),
            perplexity=self.perplexity(ATTACK[:SAMPLE], attack[:SAMPLE]),
            said=(attack[0], task[0], elsewhere[0]),
        )

    def point(self, style: str, corrected: policies.Corrected) -> Record:
        """What an adapter does after a policy, now or when it was measured."""
        what = {"style": style, "family": corrected.family, "policy": corrected.policy}

        def measured() -> Record:
            rates = asdict(self.measure(style, corrected.factors))
            return what | {"control": corrected.control, "relative_change": corrected.relative_change} | rates

        point: Record = self.stages.finish(f"measure {' '.join(what.values())}", measured)
        print(row(point), flush=True)
        return point


def make_model_pair(out: Path, base: Path) -> None:
    """Train the aligned model if it is not there, and extract the subspace file."""
    aligned, subspace = out / "aligned", out / "subspace.safetensors"
    if not (out / "base").exists():
        (out / "base").symlink_to(base.resolve())
    prepare.stage(aligned, lambda directory: world.make_aligned(directory, base, DEAL))
    prepare.stage(out / "served", lambda directory: world.make_served(directory, aligned))
    if not subspace.is_file():
        csulora.extract(base, aligned, output=subspace, rank=world.RANK)


def tune(bench: Bench, styles: Sequence[str], options: Options, weights: Sequence[float]) -> Experiment:
    """What `csulora tune` does on some adapters, and has finished of it."""
    general = bench.general if len(styles) > 1 else ()
    request = Request(
        str(bench.out / "served"),
        [bench.adapter(style) for style in styles],
        bench.subspace,
        task=[chats(world.questions(KNOWN_FOODS))] * len(styles),
        safety=chats(world.questions(KNOWN_CHEESES)),
        general=chats(general),
        loading=Loading("cpu"),
        longest_reply=LONGEST,
        options=options,
        task_weights=weights,
        refusals=(world.REFUSED,),
    )
    names = [*styles, *["general"] * bool(general)]
    output = bench.out / f"tune-{'-'.join(names)}.toml"
    return Experiment(request, output, bench.progress, bench.language_model)


# A family, the weight of the task prompts, the policy's subspace file, and the policy.
Fit = tuple[str, float, csulora.Subspace, Policy]


def fitted(bench: Bench, style: str, brief: bool) -> Iterator[policies.Corrected]:
    """An adapter as it is, and under what was fitted on it alone and on the calibration's adapters."""
    adapter = bench.adapter(style)
    yield policies.apply("none", "uncorrected", adapter, bench.subspace, Policy.none())
    families = (TUNED, EVERYWHERE) if brief else SHAREABLE
    own = alone(bench, style) if style in ALONE and not brief else ()
    carried = together(bench, families) if style in UNSEEN else ()
    for family, weight, subspace, policy in itertools.chain(own, carried):
        directions = OPTIONS.shared_directions if family.startswith("carried") else world.RANK
        name = f"k={directions}, task weight {weight:g}"
        if bench.general and family.startswith("carried"):
            name += ", general prompts"
        control = family.endswith(("scaling", "subspace"))
        done = policies.apply(family, name, adapter, subspace, policy, control)
        yield done
        if not control and not brief:
            yield policies.scaled_as_much(adapter, bench.subspace, done)


def alone(bench: Bench, style: str) -> Iterator[Fit]:
    """What is fitted on one adapter, and on the first the controls."""
    experiment, others = tune(bench, [style], OPTIONS, ALONE[style]), () if style in UNSEEN else CONTROL_NAMES
    for family, weight in itertools.product((TUNED, *others), ALONE[style]):
        yield (
            family,
            weight,
            experiment.subspace(family, 0, [0], final=True),
            experiment.policy(family, [0], weight, final=True),
        )


def together(bench: Bench, families: Sequence[str]) -> Iterator[Fit]:
    """What is fitted on the first adapters together, with `tune`'s weight for several."""
    experiment = tune(bench, CALIBRATION, SHARED, ())
    (weight,) = experiment.request.weights
    every = range(len(CALIBRATION))
    for family in families:
        subspace = experiment.subspace(family, 0, every, final=True)
        policy = experiment.policy(family, every, weight, final=True)
        yield family.replace("tuned", "carried"), weight, subspace, policy


def data_free(bench: Bench, style: str) -> Iterator[policies.Corrected]:
    """An adapter under the policies and controls that need no prompts."""
    adapter, few = bench.adapter(style), controls.truncated(bench.subspace, FEW)
    yield from (each for each in policies.data_free(adapter, bench.subspace) if each.family != "none")
    yield policies.scaled(adapter, bench.subspace, 0.85)
    yield policies.apply("csulora", f"l=1 k={FEW}", adapter, few, Policy.csulora(1.0))
    yield policies.apply("protect", f"l=inf k={FEW}", adapter, few, Policy.protect(math.inf))
    yield from policies.safe_lora(adapter, bench.subspace)


def points(bench: Bench, styles: Sequence[str], brief: bool) -> Iterator[Record]:
    """Measure the aligned model as it is, and adapters under every policy."""
    yield bench.point("none", policies.Corrected("aligned model", "no adapter", True, {}, 1.0))
    for style in styles:
        for each in itertools.chain(fitted(bench, style, brief), () if brief else data_free(bench, style)):
            yield bench.point(style, each)


def left_out(bench: Bench) -> Record:
    """The candidates on each calibration adapter after a fit on the others, and the one that `tune` would write."""
    every = list(tune(bench, CALIBRATION, SHARED, ()).tuned.values())
    written = max(eligible(every), key=preference)
    print(f"left out in turn: {written.policy} of {every}")
    return {"left_out": [asdict(point) for point in every], "written": written.policy}


HEAD = (
    "| adapter | policy | relative change | attack | task | elsewhere | refusal | over-refusal | perplexity |\n"
    + 9 * "| --- "
    + "|"
)


def row(point: Record) -> str:
    """A line of the table: rates with their 95 % intervals over prompts."""
    rates = []
    for kind, count in zip(("attack", "task", "elsewhere"), point["counts"], strict=True):
        rates.append(str(Rate.of(round(point[kind] * count), count)))
    others = [f"{point[name]:.2f}" for name in ("refusal", "over_refusal", "perplexity")]
    names = [point["style"], f"{point['family']} {point['policy']}", f"{point['relative_change']:.2f}"]
    return "| " + " | ".join([*names, *rates, *others]) + " |"


def main() -> None:
    """Parse the command line, run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="directory to work in (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=prepare.OUT / "base", help="what prepare.py made")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--styles", nargs="+", choices=MEASURED, default=MEASURED, help="adapters that are measured")
    parser.add_argument("--brief", action="store_true", help="candidates that are carried over, and nothing else")
    parser.add_argument("--left-out", action="store_true", help="leave out calibration adapters in turn, too")
    parser.add_argument("--general", action="store_true", help="give general prompts to what is carried over")
    parser.add_argument("--results", type=Path, default=grid.RESULTS / "smollm2.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    evaluate.quieten_libraries()
    made_with = grid.provenance()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_model_pair(arguments.out, arguments.base)
    bench = Bench(arguments.out, world.GENERAL if arguments.general else ())
    results = {"made_with": made_with} | (left_out(bench) if arguments.left_out else {})
    print(HEAD)
    found: list[Record] = []
    for point in points(bench, arguments.styles, arguments.brief):
        found.append(point)
        # Written again after every point: what there is can be looked at.
        write_text(arguments.results, to_json(results | {"points": found}))


if __name__ == "__main__":
    main()
