"""What `csulora inspect --html` writes: the report's numbers, every text escaped, nothing from elsewhere."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import csulora
import factories
import html_pages
from csulora.adapters.lora import Adapter
from csulora.errors import InputError, RefusedError
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from csulora.subspace.input_filter import InputFilter
from csulora.subspace.subspace import Subspace
from csulora.views.html.charts import Axis, round_values
from csulora.views.html.expert_maps import ExpertMaps, Grid
from csulora.views.html.numbers import number, percent, short_undo, undo
from csulora.views.html.page import assess, render
from csulora.views.html.spectrum import Spectrum
from csulora.views.layout import Layout, columns, kind_of, place

pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj"
VOID = {"meta", "wbr"}


class Parsed(HTMLParser):
    """All elements of a page with their attributes, all text, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self) -> tuple[Counter[str], set[str]]:
        """How many elements of each kind there are, the line breaks that names may have aside, and which attributes."""
        tags = Counter(tag for tag, _ in self.elements if tag != "wbr")
        return tags, {attribute for _, attributes in self.elements for attribute in attributes}

    def titles(self) -> list[str]:
        return [attributes["title"] or "" for _, attributes in self.elements if "title" in attributes]


@pytest.fixture
def subspace() -> Subspace:
    return factories.subspace()


@pytest.fixture
def adapter() -> Adapter:
    return factories.adapter()


# What it says


def test_every_figure_of_every_module_is_on_the_page(adapter: Adapter, subspace: Subspace) -> None:
    policy = Policy(overrides=(Override("q_proj", gains=(0.9, 0.1, 0.3, 0.7)),))
    _, report = csulora.correct(adapter, subspace, policy)
    titles = Parsed(html_pages.rendered(adapter, subspace, policy)).titles()
    for module in report.modules:
        assert module.energies is not None
        assert module.gains is not None
        figures = {
            "aligned": [module.energies["aligned"], module.gains["aligned"]],
            "partial": [module.energies["left"] + module.energies["right"]],
            "left": [module.gains["left"]],
            "right": [module.gains["right"]],
            "off": [module.energies["off"], module.gains["off"]],
            "undo": [module.undo],
            "relative change": [module.relative_change],
        }
        for name, values in figures.items():
            shown = [re.fullmatch(rf"{re.escape(module.module)}: {name} ([-+.0-9]+)( %)?", title) for title in titles]
            found = sorted(float(match[1]) / (100 if match[2] else 1) for match in shown if match)
            assert found == pytest.approx(sorted(values), abs=6e-4)


def test_left_and_right_gains_share_a_map_unless_they_differ(adapter: Adapter, subspace: Subspace) -> None:
    assert "Gain of the partial component" in html_pages.rendered(adapter, subspace, Policy.csulora())
    split = html_pages.rendered(adapter, subspace, Policy(overrides=(Override("*", gains=(1, 0.5, 0.6, 1)),)))
    assert "Gain of the left component" in split
    assert "Gain of the right component" in split
    assert "Gain of the partial component" not in split


def test_the_page_says_what_it_was_made_from(adapter: Adapter, subspace: Subspace) -> None:
    text = Parsed(html_pages.rendered(adapter, subspace, Policy(0, 3, float("inf"), rank=2, max_undo=9.0))).text
    for fact in (
        adapter.sha256,
        subspace.sha256,
        "from base to aligned",
        "aligned 0, partial 3, off inf; rank: 2; modules outside the subspace file: refused; undo at most 9",
        f"csulora {csulora.__version__}",
    ):
        assert fact in text


def test_a_page_without_a_policy_shows_nothing_of_one(adapter: Adapter, subspace: Subspace) -> None:
    assessment = assess(adapter, subspace, Policy.none())
    page = Parsed(render(assessment, subspace))
    assert not page.open
    assert f"Total undo {assessment.report.totals.undo:+.3f} share" in page.text
    tables = page.text.partition("What the figures mean")[0]
    assert not [word for word in ("penalties", "elative change", "Gains", "gain, %", "undo after") if word in tables]


def test_the_page_says_what_the_policy_depends_on(adapter: Adapter, subspace: Subspace) -> None:
    input_filters = {name: InputFilter(torch.ones(n, 1), torch.ones(n, 1)) for name, (_, n) in factories.SHAPES.items()}
    overrides = (Override("*", directions=Directions((0.5,), (0.5,))),)
    policy = Policy.none(overrides=overrides, reference_energy=0.25, filtered=True)
    text = Parsed(html_pages.rendered(adapter, subspace.with_input_filters(input_filters), policy)).text
    assert (
        "1 overrides, with a reference energy of 25.0 %, on the inputs that the subspace file's input filters select"
        in text
    )


def test_the_page_says_an_adapter_s_strength_or_that_it_has_none(adapter: Adapter, subspace: Subspace) -> None:
    alike = Policy.none(overrides=(Override("*", directions=Directions((0.5,), (0.5,), (2.0,))),))
    own = alike.with_strength(adapter.sha256, 1.25)
    text = Parsed(html_pages.rendered(adapter, subspace, own)).text
    assert "1 overrides, and reinforces 1.25 times as much in this adapter; rank: keep" in text
    refused = replace(own, max_total_undo=-1e9)
    report = assess(adapter, subspace, refused).report
    assert report.totals == assess(adapter, subspace, alike.strengthened(1.25)).report.totals
    text = Parsed(html_pages.rendered(adapter, subspace, alike.with_strength("0" * 64, 1.25))).text
    assert "the policy has strengths for other adapters, and none for this one" in text
    assert "times as much" not in text


def test_modules_that_a_refusing_policy_would_drop_are_shown_as_dropped() -> None:
    shapes = {Q: (40, 40)}
    outside = factories.adapter(shapes | {"lm_head": (40, 40)})
    text = Parsed(
        html_pages.rendered(outside, factories.subspace(shapes), Policy.csulora(drop_uncovered=("*",), max_undo=-1e9))
    ).text
    assert "not covered by the subspace file: dropped" in text


def test_a_refusal_is_shown_with_its_reason_and_the_figures(adapter: Adapter, subspace: Subspace) -> None:
    _, report = csulora.correct(adapter, subspace, csulora.Policy.csulora())
    worst = report.worst_undo
    assert worst is not None
    assert worst.undo is not None
    text = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(max_undo=worst.undo - 0.001))).text
    assert f"The policy refuses this adapter. module {worst.module} undoes" in text
    assert "some/adapter" not in text
    assert "All 3 modules" in text
    assert (
        "The policy refuses"
        not in Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(max_undo=worst.undo))).text
    )


def test_modules_outside_the_subspace_are_shown_as_such(subspace: Subspace) -> None:
    adapter = factories.adapter({**factories.SHAPES, "lm_head": (50, 40)})
    page = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora()))
    assert "The policy refuses this adapter. the subspace file does not cover module lm_head" in page.text
    assert "lm_head: not measured" in page.titles()
    assert "not covered by the subspace file: kept" in page.text
    dropped = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(drop_uncovered=("*",))))
    assert "over 3 of 4 modules" in dropped.text
    assert "not covered by the subspace file: dropped" in dropped.text


def test_offenders_come_in_order_of_undo(adapter: Adapter, subspace: Subspace) -> None:
    _, report = csulora.correct(adapter, subspace, csulora.Policy.csulora())
    page = html_pages.rendered(adapter, subspace, Policy.csulora())
    table = page[page.index("Largest offenders") : page.index("<details>")]
    found = [name.replace("<wbr>", "") for name in re.findall(r"<code>(.*?)</code>", table)]
    assert found == [m.module for m in sorted(report.measured, key=lambda m: -(m.undo or 0))]


def test_another_subspaces_policy_and_adapter_are_refused(adapter: Adapter, subspace: Subspace) -> None:
    with pytest.raises(RefusedError, match="was tuned for the subspace file"):
        html_pages.rendered(adapter, subspace, Policy.csulora(subspace_sha256="0" * 64))
    with pytest.raises(RefusedError, match="covers none"):
        html_pages.rendered(factories.adapter({"model.layers.9.mlp.up_proj": (56, 40)}), subspace, Policy.csulora())


def test_the_page_is_deterministic(adapter: Adapter, subspace: Subspace) -> None:
    assert html_pages.rendered(adapter, subspace, Policy.csulora()) == html_pages.rendered(
        adapter, subspace, Policy.csulora()
    )


# Experts


def page_of_experts(layers: int, experts: int, **others: tuple[int, int]) -> Parsed:
    shapes = dict.fromkeys(html_pages.experts(layers, experts), (40, 40)) | others
    page = Parsed(html_pages.rendered(factories.adapter(shapes), factories.subspace(shapes), Policy.csulora()))
    assert not page.open
    return page


def test_experts_are_cells_of_four_maps_and_no_rows() -> None:
    page = page_of_experts(3, 5, **{Q: (40, 40)})
    assert page.count()[0]["rect"] == 4 * 3 * 5
    assert "The 1 modules that are no experts" in page.text
    assert page.text.count("layer 2, expert 4:") == 4
    assert sum("experts.4" in title for title in page.titles()) == 0


def test_a_model_of_nothing_but_experts_has_maps_of_them_alone() -> None:
    page = page_of_experts(2, 3)
    assert page.count()[0]["rect"] == 4 * 2 * 3
    assert "that are no experts" not in page.text
    assert "column a kind of module" not in page.text


def test_one_expert_that_undoes_much_has_the_full_colour() -> None:
    shapes = dict.fromkeys(html_pages.experts(2, 4), (40, 40))
    adapter, subspace = factories.adapter(shapes), factories.subspace(shapes)
    guilty = "model.layers.1.mlp.experts.2.up_proj"
    found = subspace[guilty]
    against = csulora.LoraModule(-100 * found.u.float() * found.s, found.v.float().t().contiguous())
    report = assess(replace(adapter, modules=adapter.modules | {guilty: against}), subspace, Policy.none()).report
    maps = ExpertMaps.of(report)
    assert maps is not None
    undo, share, inside = maps.maps
    name = guilty.removesuffix(".up_proj")
    assert undo.depth(name) == 1
    assert undo.values[name] == pytest.approx(100, rel=1e-3)
    assert sum(share.values.values()) == pytest.approx(1)
    assert all(0 <= value <= 1 for value in inside.values.values())


def test_experts_of_two_stacks_have_rows_of_their_own() -> None:
    grid = Grid.of(["encoder.layers.0.experts.1", "decoder.layers.0.experts.0", "encoder.layers.0.experts.0"])
    assert [line.label for line in grid.lines] == ["decoder.layers.0.experts", "encoder.layers.0.experts"]
    assert [expert for _, expert, _ in grid.lines[1].cells] == [0, 1]


# The frontier


def test_the_frontier_is_drawn_and_listed(adapter: Adapter, subspace: Subspace) -> None:
    frontier = html_pages.frontier(subspace.sha256)
    page = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(), frontier))
    assert frontier.verdict in page.text
    assert (
        "1. tuned for adapter (recommended) 95 (76 to 99) 90 (70 to 97) 75 (47 to 91) 5 (1 to 24) 85 (64 to 95) 30.0"
        in page.text
    )
    assert "scaling x0.5 for adapter (control)" in page.text
    marks = [attributes.get("class") for tag, attributes in page.elements if tag == "g"]
    assert sorted(map(str, marks)) == ["mark candidate", "mark control", "mark recommended"]


def test_a_policy_file_without_recommendation_is_marked(adapter: Adapter, subspace: Subspace) -> None:
    frontier = replace(html_pages.frontier(subspace.sha256), recommended=None)
    page = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(), frontier))
    assert "tuned for adapter (in the policy file)" in page.text
    assert "(recommended)" not in page.text


def test_a_frontier_without_refusals_and_ordinary_prompts_has_no_columns_for_them(
    adapter: Adapter, subspace: Subspace
) -> None:
    frontier = html_pages.frontier(subspace.sha256)
    bare = (replace(point, refusals=None, general=None) for point in frontier.points)
    frontier = replace(frontier, points=tuple(bare))
    page = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(), frontier))
    assert "1. tuned for adapter (recommended) 95 (76 to 99) 90 (70 to 97) 30.0" in page.text
    assert "refused, %" not in page.text
    assert "all else" not in page.text


def test_without_a_frontier_there_is_none(adapter: Adapter, subspace: Subspace) -> None:
    assert "Frontier" not in Parsed(html_pages.rendered(adapter, subspace, Policy.csulora())).text


def test_a_frontier_of_another_subspace_is_refused(adapter: Adapter, subspace: Subspace) -> None:
    with pytest.raises(InputError, match="measured with the subspace file 0000"):
        html_pages.rendered(adapter, subspace, Policy.csulora(), html_pages.frontier("0" * 64))


# Hostile names, and nothing from elsewhere


def test_replies_stand_side_by_side(adapter: Adapter, subspace: Subspace) -> None:
    found = html_pages.evaluation(adapter, "a tale")
    page = Parsed(render(assess(adapter, subspace, Policy.csulora()), subspace, evaluation=found))
    assert "1 safety prompts, 1 task prompts, 1 general prompts" in page.text
    assert "refuses the adapter: it undoes a tale" in page.text
    assert "Replies to 1 of 1 general prompts" in page.text
    other = replace(adapter, sha256="1" * 64)
    with pytest.raises(InputError, match="the evaluation is of a tale, whose content is another than this adapter's"):
        render(assess(other, subspace, Policy.csulora()), subspace, evaluation=found)


@pytest.mark.parametrize("hostile", html_pages.HOSTILE_NAMES)
def test_no_name_becomes_markup(hostile: str) -> None:
    plain, page = html_pages.page("name"), html_pages.page(hostile)
    expected, found = Parsed(plain), Parsed(page)
    assert not found.open
    assert found.count() == expected.count()
    assert all(character.isprintable() or character == "\n" for character in page)
    page.encode()


def test_names_are_shown_as_they_are() -> None:
    text = Parsed(html_pages.page("a <b>&amp;\"quoted\" 'name' {{ 7 * 7 }}")).text
    assert text.count("a <b>&amp;\"quoted\" 'name' {{ 7 * 7 }}") > 5


def test_the_page_refers_to_nothing(adapter: Adapter, subspace: Subspace) -> None:
    page = html_pages.rendered(adapter, subspace, Policy.csulora(), html_pages.frontier(subspace.sha256))
    parsed = Parsed(page)
    assert not parsed.open
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in parsed.elements
    }
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"url\(|@import|@font-face|https?:", page)
    policies = [a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_tables_and_drawings_can_be_read_aloud(adapter: Adapter, subspace: Subspace) -> None:
    parsed = Parsed(html_pages.rendered(adapter, subspace, Policy.csulora(), html_pages.frontier(subspace.sha256)))
    for tag, attributes in parsed.elements:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row", "colgroup")
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


# Its parts


@pytest.mark.parametrize(
    ("share", "decimals", "sign", "text"),
    [
        (0.4638, 1, "", "46.4 %"),
        (0.4638, 0, "+", "+46 %"),
        (-0.02, 0, "+", "-2 %"),
        (-0.0004, 1, "+", "0.0 %"),
        (0.0004, 1, "+", "0.0 %"),
        (1.0, 0, "", "100 %"),
        (12345.0, 0, "+", "+1e+06 %"),
    ],
)
def test_percent(share: float, decimals: int, sign: str, text: str) -> None:
    assert percent(share, decimals, sign) == text


@pytest.mark.parametrize(
    ("share", "text", "short"),
    [
        (0.1538, "+0.154", "+0.15"),
        (-1.0, "-1.000", "-1.00"),
        (9.996, "+9.996", "+10"),
        (12345.0, "+12345.000", "+1e+04"),
    ],
)
def test_undo(share: float, text: str, short: str) -> None:
    assert (undo(share), short_undo(share)) == (text, short)


@pytest.mark.parametrize(("value", "text"), [(0.56, "0.560"), (128.4, "128"), (1.26e-6, "1.26e-06"), (0.0, "0.00")])
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("module", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers.", 3), "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.12.gate_proj", ("model.layers.", 0), "mlp.experts.12.gate_proj"),
        ("h.11.mlp.c_fc", ("h.", 11), "mlp.c_fc"),
        ("0.linear", ("", 0), "linear"),
        (".0.linear", (".", 0), "linear"),
        ("model.layers.00.q", ("", -1), "model.layers.00.q"),
        ("lm_head", ("", -1), "lm_head"),
        ("model.layers." + "9" * 5000 + ".q", ("", -1), "model.layers." + "9" * 5000 + ".q"),
    ],
)
def test_place(module: str, layer: tuple[str, int], kind: str) -> None:
    assert place(module) == (layer, kind)


def test_the_kind_of_an_expert_has_no_number() -> None:
    kinds = [kind_of(f"model.layers.3.{name}") for name in ("mlp.experts.12.up_proj", "mlp.up_proj", "mlp.gate")]
    assert kinds == ["mlp.experts.up_proj", "mlp.up_proj", "mlp.gate"]
    assert [column.short for column in columns(kinds)] == ["experts.up_proj", "up_proj", "gate"]


def test_layers_stand_in_order_of_their_numbers() -> None:
    layout = Layout.of([f"model.layers.{i}.mlp.up_proj" for i in (10, 9, 0)] + ["lm_head"])
    assert [row.label for row in layout.rows] == ["none", "0", "9", "10"]
    assert [column.short for column in layout.columns] == ["lm_head", "up_proj"]
    assert layout.rows[0].modules == ("lm_head", None)


def test_kinds_stand_in_order_of_their_numbers() -> None:
    layout = Layout.of([f"layers.0.experts.{i}.up" for i in (10, 9, 0)])
    assert [column.kind for column in layout.columns] == ["experts.0.up", "experts.9.up", "experts.10.up"]


def test_stacks_and_kinds_that_share_a_last_name_keep_the_whole_name() -> None:
    layout = Layout.of(["encoder.block.0.a.q", "decoder.block.0.a.q", "decoder.block.0.b.q", "decoder.block.0.b.wi"])
    assert [row.label for row in layout.rows] == ["decoder.block.0", "encoder.block.0"]
    assert [column.short for column in layout.columns] == ["a.q", "b.q", "wi"]


def test_a_logarithmic_axis() -> None:
    axis = Axis(0.01, 1.0, 100, 0, logarithmic=True)
    assert [axis.at(value) for value in (0.01, 0.1, 1.0)] == [100, 50, 0]
    assert [tick.label for tick in axis.ticks(round_values(0.01, 1.0))] == [
        "0.01",
        "0.02",
        "0.05",
        "0.1",
        "0.2",
        "0.5",
        "1",
    ]
    assert round_values(1e-6, 1.0) == pytest.approx([10.0**e for e in range(-6, 1)])


def test_the_spectrum_has_each_modules_values_and_the_noise_edge(subspace: Subspace) -> None:
    spectrum = Spectrum.of(subspace)
    assert [panel.short for panel in spectrum.panels] == ["down_proj", "up_proj", "q_proj"]
    for panel in spectrum.panels:
        (line,) = panel.lines
        places = [tuple(map(float, point.split(","))) for point in line.points.split()]
        assert len(places) == panel.ranks[0] == 6
        assert places == sorted(places)
        assert [y for _, y in places] == sorted(y for _, y in places)  # falling values: growing y
        assert panel.edge is not None
        assert panel.edge > places[-1][1]
        assert panel.noise_edge == 0.01


def test_a_noise_edge_far_below_does_not_flatten_the_spectrum(adapter: Adapter, subspace: Subspace) -> None:
    modules = {
        name: replace(module, certificate=replace(module.certificate, noise_edge=1e-6))
        for name, module in subspace.items()
    }
    subspace = Subspace(modules, subspace.provenance)
    spectrum = Spectrum.of(subspace)
    assert all(panel.edge is None for panel in spectrum.panels)
    assert "noise edge 1.00e-06, far below" in html_pages.rendered(adapter, subspace, Policy.csulora())


def test_a_noise_edge_above_all_values_is_said_to_be_there(adapter: Adapter, subspace: Subspace) -> None:
    modules = {
        name: replace(module, certificate=replace(module.certificate, noise_edge=1e6))
        for name, module in subspace.items()
    }
    page = html_pages.rendered(adapter, Subspace(modules, subspace.provenance), Policy.csulora())
    assert "noise edge 1.00e+06, above all values" in page
    assert "far below" not in page


def test_the_spectrum_has_a_line_per_layer_of_experts(subspace: Subspace) -> None:
    shapes = dict.fromkeys(html_pages.experts(3, 8), (40, 40))
    panels = Spectrum.of(factories.subspace(shapes)).panels
    assert [(panel.short, len(panel.lines), panel.modules) for panel in panels] == [
        (f"experts.{projection}_proj", 3, 24) for projection in ("down", "gate", "up")
    ]


def test_long_spectra_are_thinned_and_keep_their_ends() -> None:
    subspace = factories.subspace({"model.layers.0.mlp.up_proj": (300, 300)}, rank=256)
    (line,) = Spectrum.of(subspace).panels[0].lines
    places = line.points.split()
    assert 40 <= len(places) <= 50
    assert (places[0].split(",")[0], places[-1].split(",")[0]) == ("44", "350")


def test_modules_without_directions_have_no_line() -> None:
    shapes = {Q: (40, 40), "model.layers.1.self_attn.q_proj": (40, 40)}
    subspace = factories.subspace(shapes)
    still = factories.subspace(shapes, rank=0)
    mixed = Subspace(
        {Q: subspace[Q], "model.layers.1.self_attn.q_proj": still["model.layers.1.self_attn.q_proj"]},
        subspace.provenance,
    )
    (panel,) = Spectrum.of(mixed).panels
    assert [bool(line.points) for line in panel.lines] == [True, False]
    assert panel.ranks == (0, 6)


def test_an_update_of_nothing_has_a_page(adapter: Adapter, subspace: Subspace) -> None:
    modules = {name: replace(module, b=torch.zeros_like(module.b)) for name, module in adapter.modules.items()}
    page = Parsed(html_pages.rendered(replace(adapter, modules=modules), subspace, Policy.csulora()))
    assert "Nothing is changed." in page.text
    assert f"{Q}: undo +0.000" in page.titles()


def test_a_sum_has_a_page(adapter: Adapter, subspace: Subspace) -> None:
    whole = csulora.combine([adapter, replace(adapter, path=Path("some/other"))], subspace, [1.0, 0.5])
    assert "adapter + 0.5 other" in Parsed(html_pages.rendered(whole, subspace, Policy.csulora())).text
