"""Pages of `csulora inspect --html` with invented content, and names that somebody might give to harm their reader."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import factories
from csulora.adapters.lora import Adapter
from csulora.evaluation.evaluation import KINDS, AdapterEvaluation, Evaluation, Row
from csulora.evaluation.outcomes import Outcome
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning.frontier import Frontier, Point, Rate, Refusals
from csulora.views.html.page import assess, render

HOSTILE_NAMES = [
    "<script>window.pwned = 1</script>",
    "\"><img src=x onerror='window.pwned = 1'>",
    "' onmouseover='window.pwned = 1",
    "</title></style></table></svg><b>",
    "<!-- ",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "line\nline\ttab\x00nul\x1bescape",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe",
    "half of a pair \udcff",
]


def frontier(subspace_sha256: str, name: str = "adapter") -> Frontier:
    """A recommended policy, a candidate and a control, with refusals counted, and general prompts."""
    few, most = (Refusals(Rate.of(safety, 20), Rate.of(1, 20)) for safety in (7, 17))
    points = (
        Point("csulora", "csulora (0, 1, 1)", False, Rate.of(8, 20), Rate.of(20, 20), 0.1, few, Rate.of(12, 12)),
        Point("tuned", f"tuned for {name}", False, Rate.of(18, 20), Rate.of(19, 20), 0.3, most, Rate.of(9, 12)),
        Point("scaling", f"scaling x0.5 for {name}", True, Rate.of(9, 20), Rate.of(8, 20), 0.5, few, Rate.of(6, 12)),
    )
    best = f"tuned for {name}"
    return Frontier(subspace_sha256, (name,), points, best, best, f"Tuned is best for {name}.")


def page(name: str, modules: Sequence[str] | None = None) -> str:
    """A page on which everything is called ``name``: adapter, checkpoints, frontier and, unless given, modules."""
    modules = modules or [name, f"layers.0.{name}", f"{name}.1.mlp"]
    shapes = dict.fromkeys((writable(module) for module in modules), (40, 40))
    subspace = factories.subspace(shapes)
    named = Subspace(dict(subspace), replace(subspace.provenance, base=name, aligned=name))
    path = Path(writable(name).replace("/", "\N{DIVISION SLASH}").replace("\0", ""))
    refusing = Policy.csulora(max_undo=-1e9)
    adapter = replace(factories.adapter(shapes), path=path)
    found = evaluation(adapter, name)
    return render(assess(adapter, named, refusing), named, refusing, frontier(named.sha256, name), found)


def evaluation(adapter: Adapter, name: str) -> Evaluation:
    """One prompt of each kind; a policy answers one as it should, and another refuses the adapter."""
    said: dict[str, tuple[Outcome, ...]] = {
        kind: (Outcome(name, 1.5, kind != "task", kind == "general", kind == "safety"),) for kind in KINDS
    }
    rows = (
        Row("model alone", "model", None, None, None, said),
        Row("raw", "raw", None, 0.0, None, said),
        Row(name, "policy", name, 0.3, None, said, {name: {name: 0.5}}),
        Row("scaling x0.70", "scaling", name, 0.3, None, said),
        Row(f"strict {name}", "policy", f"strict {name}", None, f"it undoes {name}", {}),
    )
    chats: tuple[tuple[dict[str, str], ...], ...] = (({"role": "user", "content": name},),)
    found = AdapterEvaluation(name, adapter.sha256, dict.fromkeys(KINDS, chats), rows, ())
    return Evaluation(name, "0" * 64, (found,))


def experts(layers: int, experts: int) -> list[str]:
    """Modules of a model that has nothing else than experts with gates."""
    projections = ("gate_proj", "up_proj", "down_proj")
    return [f"model.layers.{i}.mlp.experts.{j}.{p}" for i in range(layers) for j in range(experts) for p in projections]


def rendered(adapter: Adapter, subspace: Subspace, policy: Policy, frontier: Frontier | None = None) -> str:
    """The page of what a policy does to an adapter."""
    return render(assess(adapter, subspace, policy), subspace, policy, frontier)


def writable(name: str) -> str:
    """The name in what UTF-8 can express."""
    return name.encode(errors="replace").decode()
