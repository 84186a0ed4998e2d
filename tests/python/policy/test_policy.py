import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from csulora.correction.core_policy import attenuation, core_options
from csulora.errors import InputError
from csulora.native import _core
from csulora.policy.globs import matches
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance
from csulora.policy.toml import one_line

Q = "model.layers.0.self_attn.q_proj"

penalties = st.floats(min_value=0, allow_nan=False, allow_infinity=True) | st.integers(0, 2**53)
gains = st.floats(0, 1)
sides = st.lists(gains, max_size=4).map(tuple)
multiples = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4).map(tuple)
overrides = (
    st.builds(Override, st.text(max_size=8), penalties=st.tuples(penalties, penalties, penalties))
    | st.builds(Override, st.text(max_size=8), gains=st.tuples(gains, gains, gains, gains))
    | st.builds(Override, st.text(max_size=8), directions=st.builds(Directions, sides, sides, multiples))
)
GLOBS = st.text(min_size=1, max_size=8)
policies = st.builds(
    Policy,
    aligned=penalties,
    partial=penalties,
    off=penalties,
    rank=st.sampled_from(["keep", "exact"]) | st.integers(1, 2**53),
    keep_uncovered=st.lists(GLOBS, max_size=2).map(tuple),
    drop_uncovered=st.lists(GLOBS, max_size=2).map(tuple),
    max_undo=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    overrides=st.lists(overrides, max_size=3).map(tuple),
    reference_energy=st.none() | st.floats(0, 1, exclude_min=True),
    subspace_sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
)


@given(policy=policies)
def test_a_policy_survives_its_toml_document(policy: Policy) -> None:
    assert Policy.from_dict(tomllib.loads(tomli_w.dumps(policy.to_dict()))) == policy


def test_a_policy_survives_its_file(tmp_path: Path) -> None:
    policy = Policy.project(rank=3, max_undo=0.5, overrides=(Override("q_proj", penalties=(0, math.inf, 1)),))
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy


def test_reads_what_a_person_writes(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        """
        aligned = 0
        partial = inf
        rank = 16
        max_undo = 0.5

        [[overrides]]
        match = "layers.0.*"
        penalties = { aligned = 1, partial = 2.5, off = inf }

        [[overrides]]
        match = "*.mlp.*"
        [overrides.gains]
        aligned = 1
        left = 0.5
        right = 0.25
        off = 0
        """
    )
    assert Policy.load(tmp_path / "policy.toml") == Policy(
        partial=math.inf,
        rank=16,
        max_undo=0.5,
        overrides=(
            Override("layers.0.*", penalties=(1, 2.5, math.inf)),
            Override("*.mlp.*", gains=(1, 0.5, 0.25, 0)),
        ),
    )


def test_an_empty_file_is_the_default_policy(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").touch()
    assert Policy.load(tmp_path / "policy.toml") == Policy.csulora(1.0)


SHA = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aligned = -1", "aligned is -1; a penalty must be 0 or more"),
        ("partial = nan", "partial is nan; a penalty must be 0 or more"),
        ("off = true", "off is True; it must be a number"),
        ('aligned = "1"', "aligned is '1'; it must be a number"),
        ("aligned = [1]", r"aligned is \[1\]; it must be a number"),
        (f"aligned = 1{'0' * 400}", "it must be a number"),
        ("aligned = 1979-05-27", "it must be a number"),
        ("rank = 0", "rank is 0; it must be keep, exact or"),
        ("rank = true", "rank is True; it must be"),
        ("rank = 8.0", "rank is 8.0; it must be"),
        ('rank = "all"', "rank is 'all'; it must be"),
        (f"rank = 1{'0' * 400}", "it must be keep, exact or"),
        ("rank = [1]", r"rank is \[1\]; it must be"),
        ('uncovered = "keep"', "unknown field 'uncovered'"),
        ('keep_uncovered = "*"', "keep_uncovered is '\\*'; it must be a list of globs"),
        ("drop_uncovered = [1]", r"drop_uncovered is \(1,\); it must be a list of globs"),
        ('keep_uncovered = [""]', r"keep_uncovered is \('',\); it must be"),
        ("max_undo = inf", "max_undo is inf; it must be a finite number"),
        ("max_undo = nan", "max_undo is nan; it must be a finite number"),
        ('max_undo = "x"', "max_undo is 'x'; it must be a number"),
        ("reference_energy = 0", r"reference_energy is 0; it must lie in \(0, 1\]"),
        ("reference_energy = 1.5", r"reference_energy is 1.5; it must lie in \(0, 1\]"),
        ("reference_energy = nan", "reference_energy is nan; it must lie in"),
        ('reference_energy = "x"', "reference_energy is 'x'; it must be a number"),
        ("subspace_sha256 = 5", "subspace_sha256 is 5; it must be 64 hexadecimal digits"),
        (f'subspace_sha256 = "{SHA}0"', "it must be 64 hexadecimal digits"),
        ("strengths = 1", "strengths must be a table of numbers by adapters' sha256"),
        ("strengths = {}", "strengths is empty; remove it to let all adapters through, or name one there"),
        ("[strengths]\nabc = 1", "strengths: 'abc' is no adapter's sha256"),
        (f"[strengths]\n{SHA} = -1", "is -1; it must be a number from 0 on"),
        (f"[strengths]\n{SHA} = inf", "is inf; it must be a number from 0 on"),
        (f'[strengths]\n{SHA} = "1"', "is '1'; it must be a number"),
        (f"[strengths]\n{SHA} = 1", "the policy reinforces nothing, so it has no strength"),
        ("surprise = 1", "unknown field 'surprise'; the fields are aligned, partial, off, rank, "),
        ("overrides = 1", "overrides must be a list of tables"),
        ("overrides = [1]", "every override must be a table with a `match`"),
        ("overrides = [{ gains = {} }]", "every override must be a table with a `match`"),
        ("overrides = [{ match = 1 }]", "every override must be a table with a `match`"),
        ('overrides = [{ match = "x" }]', "override 'x': give either penalties, gains or directions"),
        (
            'overrides = [{ match = "x", gian = {} }]',
            "override 'x': unknown field 'gian'; the fields are match, penalties, gains, directions",
        ),
        ('overrides = [{ match = "x", penalties = {} }]', "penalties must be a table of aligned, partial, off"),
        ('overrides = [{ match = "x", directions = { left = [1] } }]', "directions must be a table of the lists left"),
        (
            'overrides = [{ match = "x", directions = { left = [1], right = [1], up = [] } }]',
            "directions must be a table of the lists left",
        ),
        (
            'overrides = [{ match = "x", directions = { left = [], right = [], reinforced = [inf] } }]',
            "directions reinforced is inf; it must be finite",
        ),
        (
            'overrides = [{ match = "x", directions = { left = 1, right = [] } }]',
            "directions must be a table of the lists",
        ),
        (
            'overrides = [{ match = "x", directions = { left = [], right = [1.5] } }]',
            "directions right is 1.5; it must lie",
        ),
        (
            'overrides = [{ match = "x", directions = { left = ["1"], right = [] } }]',
            "left is '1'; it must be a number",
        ),
        ('overrides = [{ match = "x", gains = 1 }]', "gains must be a table of aligned, left, right, off"),
        ('overrides = [{ match = "x", gains = { aligned = 1, left = 1, off = 1 } }]', "gains must be a table of"),
        (
            'overrides = [{ match = "x", penalties = { aligned = 0, partial = -1, off = 0 } }]',
            "override 'x': partial is -1; a penalty must be 0 or more",
        ),
        (
            'overrides = [{ match = "x", penalties = { aligned = 0, partial = "a", off = 0 } }]',
            "override 'x': partial is 'a'; it must be a number",
        ),
        (
            'overrides = [{ match = "x", gains = { aligned = 0, left = 1.5, right = 0, off = 0 } }]',
            r"override 'x': gain left is 1\.5; it must lie in \[0, 1\]",
        ),
        (
            'overrides = [{ match = "x", gains = { aligned = nan, left = 1, right = 0, off = 0 } }]',
            "gain aligned is nan",
        ),
        ("aligned = ", "not a readable TOML file"),
        ("aligned = 1\naligned = 2", "not a readable TOML file"),
        ("a = " + "[" * 5000, "not a readable TOML file"),
    ],
)
def test_refuses_what_is_no_policy_with_the_files_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"policy\.toml: .*{message}"):
        Policy.load(path)


def test_refuses_what_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"policy\.toml: not a readable TOML file"):
        Policy.load(tmp_path / "policy.toml")
    with pytest.raises(InputError, match=r"missing\.toml: no such policy; choose a preset"):
        Policy.load(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="Is a directory"):
        Policy.load(tmp_path)


def test_refuses_overrides_of_the_wrong_length() -> None:
    with pytest.raises(InputError, match="give exactly aligned, partial, off"):
        Override("x", penalties=(1, 2))
    with pytest.raises(InputError, match="give exactly aligned, left, right, off"):
        Override("x", gains=(1, 1, 1))
    with pytest.raises(InputError, match="give either penalties, gains or directions"):
        Override("x", penalties=(1, 1, 1), gains=(1, 1, 1, 1))
    with pytest.raises(InputError, match="match is 3; it must be a glob"):
        Override(3, gains=(1, 1, 1, 1))


def numbers(found: object) -> tuple[float, ...]:
    if isinstance(found, _core.Penalties):
        return found.aligned, found.partial, found.off
    assert isinstance(found, _core.Components)
    return found.aligned, found.left, found.right, found.off


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), (0, 1, 1)),
        (Policy.csulora(3), (0, 3, 3)),
        (Policy.protect(2), (2, 2, 0)),
        (Policy.project(), (0, math.inf, math.inf)),
        (Policy.none(), (0, 0, 0)),
    ],
)
def test_presets_are_the_designs(policy: Policy, expected: tuple[float, ...]) -> None:
    assert numbers(attenuation(policy, Q)) == expected


def test_the_first_override_that_matches_counts() -> None:
    policy = Policy.csulora(
        3,
        overrides=(
            Override("layers.0.self_attn.*", penalties=(1, 2, 3)),
            Override("q_proj", gains=(1, 0.5, 0.25, 0)),
        ),
    )
    assert numbers(attenuation(policy, Q)) == (1, 2, 3)
    assert numbers(attenuation(policy, Q.replace("0", "1"))) == (1, 0.5, 0.25, 0)
    assert numbers(attenuation(policy, "model.layers.1.mlp.up_proj")) == (0, 3, 3)


def test_an_override_that_matches_nothing_is_an_error() -> None:
    policy = Policy(overrides=(Override("q_proj", gains=(1, 1, 1, 1)), Override("q_porj", gains=(1, 1, 1, 1))))
    with pytest.raises(InputError, match="override 'q_porj': matches no module of the subspace file"):
        policy.check_overrides([Q])


def test_ranks_become_rules() -> None:
    assert core_options(Policy(rank="keep")).rule == _core.RankRule.keep
    assert core_options(Policy(rank="exact")).rule == _core.RankRule.exact
    fixed = core_options(Policy(rank=7))
    assert (fixed.rule, fixed.rank) == (_core.RankRule.fixed, 7)


def test_an_override_that_others_leave_nothing_to_is_refused() -> None:
    every, one = Override("*", gains=(1.0,) * 4), Override("layers.0.q_proj", gains=(0.0,) * 4)
    modules = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    Policy.none(overrides=(one, every)).check_overrides(modules)
    for overrides in ((every, one), (one, one, every)):
        with pytest.raises(InputError, match=r"'layers\.0\.q_proj': all that it matches is matched by one before it"):
            Policy.none(overrides=overrides).check_overrides(modules)


names_and_globs = st.lists(st.sampled_from(["a", "b", "[ab]", "?", "*", "a*", "1"]), min_size=1, max_size=3).map(
    ".".join
)


@given(
    overrides=st.lists(names_and_globs, max_size=6), module=st.lists(st.sampled_from("ab1"), min_size=1).map(".".join)
)
def test_names_are_found_as_globs_are(overrides: list[str], module: str) -> None:
    every = tuple(Override(match, gains=(at / 8,) * 4) for at, match in enumerate(overrides))
    first = next((at / 8 for at, match in enumerate(overrides) if matches(module, match)), None)
    found = attenuation(Policy.none(overrides=every), module)
    assert (found.off if isinstance(found, _core.Components) else None) == first


def test_a_policy_of_very_many_modules_is_read_and_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [f"model.layers.{at}.mlp.experts.{at}.down_proj" for at in range(20_000)]
    seen: list[str] = []
    monkeypatch.setattr("csulora.policy.policy.matches", lambda module, pattern: seen.append(pattern) or False)
    policy = Policy.none(overrides=tuple(Override(module, gains=(0.5,) * 4) for module in modules))
    policy.check_overrides(modules)
    assert not seen  # a comparison of each with each takes minutes
    path = tmp_path / "policy.toml"
    path.write_text("#" * (65 << 20))  # gains of 64 directions in so many modules: 62 MiB
    assert Policy.load(path) == Policy()


def test_wildcards_are_bounded_and_names_are_not() -> None:
    """Each wildcard is tried for every module, and a report's policy may be a stranger's."""
    many = tuple(Override(f"layers.{count}.q_proj", penalties=(0, 1, 1)) for count in range(5000))
    Policy(overrides=many)
    with pytest.raises(InputError, match="1001 overrides have wildcards, and at most 1000"):
        Policy(overrides=tuple(replace(override, match=f"*{override.match}") for override in many[:1001]))


def test_strengths_of_adapters_survive_the_file_and_can_be_taken_back(tmp_path: Path) -> None:
    carried = Policy(overrides=(Override("*", directions=Directions((0.5,), (0.5,), (2.0,))),))
    policy = carried.with_strength("b" * 64, 1.5).with_strength("a" * 64, 1).with_strength("b" * 64, 0.25)
    assert policy.strengths == (("a" * 64, 1), ("b" * 64, 0.25))
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy != carried
    assert one_line(policy.to_dict()).endswith(", 2 strengths, 1 override")
    assert policy.with_strength("a" * 64, None).with_strength("b" * 64, None) == carried


@pytest.mark.parametrize(
    ("strengths", "reason"),
    [
        ({SHA: 1.0}, "must be a tuple of pairs"),
        (None, "must be a tuple of pairs"),
        ((SHA,), "must be a tuple of pairs"),
        (((SHA, 1.0), (SHA, 0.0)), "an adapter has two"),
    ],
)
def test_malformed_strengths_are_refused(strengths: Any, reason: str) -> None:
    with pytest.raises(InputError, match=f"policy strengths: {reason}"):
        Policy(strengths=strengths)


def test_the_file_alone_says_what_a_policy_was_made_from(tmp_path: Path) -> None:
    policy = Policy.protect(1.0, provenance=PolicyProvenance(("0123456789abcdef",)))
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml").provenance == policy.provenance
    assert policy == Policy.protect(1.0)
    assert "provenance" not in policy.to_dict()


@pytest.mark.parametrize("table", [[], {"prompts": "a"}, {"prompts": ["0123"]}, {"prompts": [1]}, {"other": []}])
def test_a_malformed_provenance_is_refused(table: object) -> None:
    with pytest.raises(InputError, match="policy provenance"):
        Policy.from_dict({"provenance": table})
