"""Every field of PEFT's LoraConfig, with values that only look as if they were off: refused, or not handed on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import csulora
import factories
import oracle
import zoo
from csulora.adapters.peft.config import KNOWN_FIELDS
from csulora.adapters.peft.directory import config_of
from csulora.adapters.weights_files import CONFIG_FILE
from csulora.errors import CsuloraError, InputError, RefusedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Q = "model.layers.0.self_attn.q_proj"
SHAPES = {Q: (40, 40), "model.layers.1.self_attn.q_proj": (40, 40)}
FIELDS = sorted(field.name for field in dataclasses.fields(peft.LoraConfig))
ODD: list[Any] = [
    *({}, [], "", " ", "none", "None", "false", "False", "null", "off", 0, 1, -1, 0.0, 2.0, True, False, None),
    *([None], [[]], {"a": {}}, {"a": [{"b": {}}]}, [1, "none"], "0", "1e999", "\x1b[31m", "a\nb", "\ud800"),
]
# What csulora hands on when it is in order, so that an odd value of the right type is only text.
CARRIED = {"base_model_name_or_path", "revision", "task_type", "fan_in_fan_out"}
SELECTORS = {"target_modules", "exclude_modules", "layers_to_transform"}


@pytest.fixture(scope="module")
def subspace() -> csulora.Subspace:
    return factories.subspace(SHAPES)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return factories.save_adapter(tmp_path / "plain", SHAPES, task_type="CAUSAL_LM", base_model_name_or_path="org/base")


def with_field(plain: Path, field: str, value: Any) -> Path:
    """The same adapter with one field of its configuration changed."""
    file = plain / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    return plain


def written(path: Path, subspace: csulora.Subspace, output: Path) -> dict[str, Any]:
    fixed, _ = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora())
    csulora.save_adapter(fixed, output)
    return json.loads((output / CONFIG_FILE).read_text())


def test_every_field_of_the_installed_peft_is_known() -> None:
    added_by_unsloth = {"lora_B_layout", "unsloth_fixed"}
    assert set(FIELDS) == KNOWN_FIELDS - added_by_unsloth


def outcome(path: Path, subspace: csulora.Subspace) -> dict[str, Any] | CsuloraError:
    """The configuration that would be written, or the refusal."""
    try:
        return config_of(csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora())[0])
    except CsuloraError as error:
        return error


@pytest.mark.parametrize("field", FIELDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=2 * len(ODD))
@given(value=st.sampled_from(ODD) | st.recursive(st.sampled_from(ODD), lambda inner: st.lists(inner, max_size=2)))
def test_an_odd_value_is_refused_or_not_handed_on(
    field: str, value: Any, plain: Path, subspace: csulora.Subspace
) -> None:
    before = (plain / CONFIG_FILE).read_text()
    expected = outcome(plain, subspace)
    assert isinstance(expected, dict)
    try:
        found = outcome(with_field(plain, field, value), subspace)
    finally:
        (plain / CONFIG_FILE).write_text(before)
    if isinstance(found, CsuloraError):
        assert str(found).isprintable()
        assert len(str(found)) < 3000
        return
    if field in SELECTORS:
        assert found["target_modules"] in (sorted(SHAPES), ["q_proj"])
        found["target_modules"] = ["q_proj"]
    ours = {name for name in CARRIED if name == field}
    assert {k: v for k, v in found.items() if k not in ours} == {k: v for k, v in expected.items() if k not in ours}
    peft.LoraConfig(**found)


@pytest.mark.parametrize("field", FIELDS)
def test_pefts_own_default_of_every_field_is_accepted(field: str, plain: Path, subspace: csulora.Subspace) -> None:
    default = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict().get(field)
    value = sorted(default) if isinstance(default, set) else default
    if field in ("peft_type", "peft_version"):
        value = str(getattr(value, "value", value))
    csulora.correct(csulora.load_adapter(with_field(plain, field, value)), subspace, csulora.Policy.csulora())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", "none"),
        ("use_dora", {}),
        ("kasa_config", {}),
        ("use_qalora", []),
        ("modules_to_save", []),
        ("bias", ""),
        ("layer_replication", ""),
        ("trainable_token_indices", {}),
        ("unheard_of", {}),
        ("unheard_of", ""),
        ("unheard_of", 0),
    ],
)
def test_only_pefts_exact_off_value_is_off(field: str, value: Any, plain: Path) -> None:
    with pytest.raises(RefusedError, match=field):
        csulora.load_adapter(with_field(plain, field, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dropout", 2.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", True),
        ("task_type", "BOGUS"),
        ("layers_to_transform", []),
        ("r", True),
        ("lora_alpha", "8"),
        ("use_rslora", 1),
        ("target_modules", [{}]),
        ("rank_pattern", []),
        ("inference_mode", "yes"),
        ("auto_mapping", "x"),
        ("base_model_name_or_path", "a\nb"),
        ("base_model_name_or_path", "x" * 1001),
        ("revision", ["main"]),
    ],
)
def test_values_that_peft_cannot_use_are_named(field: str, value: Any, plain: Path) -> None:
    with pytest.raises(InputError, match=f"{field} is"):
        csulora.load_adapter(with_field(plain, field, value))


def test_unknown_fields_that_are_switched_off_are_left_out(
    plain: Path, subspace: csulora.Subspace, tmp_path: Path
) -> None:
    """As a newer PEFT writes them."""
    with_field(plain, "use_something_new", False)
    with_field(plain, "something_new_config", None)
    assert not {name for name in written(plain, subspace, tmp_path / "fixed") if "new" in name}


def test_written_configuration_says_nothing_that_csulora_does_not_know(
    plain: Path, subspace: csulora.Subspace, tmp_path: Path
) -> None:
    nested: Any = {}
    for _ in range(20):
        nested = {"x": nested}
    with_field(plain, "auto_mapping", nested)
    with_field(plain, "peft_version", "99.0")
    assert written(plain, subspace, tmp_path / "fixed") == {
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj", "self_attn.q_proj"]}, ["q_proj", "self_attn.q_proj"]),
        ({"target_modules": ".*q_proj"}, sorted(SHAPES)),
        ({"target_modules": "all-linear"}, sorted(SHAPES)),
        ({"exclude_modules": ["v_proj"]}, sorted(SHAPES)),
        ({"exclude_modules": []}, ["q_proj"]),
        ({"layers_to_transform": [0, 1]}, sorted(SHAPES)),
    ],
)
def test_targets_are_the_endings_that_were_listed_or_whole_names(
    changes: dict[str, Any], expected: list[str], plain: Path
) -> None:
    for field, value in changes.items():
        with_field(plain, field, value)
    assert config_of(csulora.load_adapter(plain))["target_modules"] == expected


def test_peft_gives_the_corrected_update_whatever_selected_its_modules(tmp_path: Path) -> None:
    kind = zoo.PLAIN_LORA["both patterns, rsLoRA"]
    kind.make(tmp_path / "adapter")
    adapter = csulora.load_adapter(tmp_path / "adapter")
    csulora.save_adapter(adapter, tmp_path / "again")
    found = zoo.updates(peft.PeftModel.from_pretrained(kind.model(), tmp_path / "again"))
    for name, module in adapter.modules.items():
        expected = oracle.update(module.b, module.a, module.scale)
        assert oracle.relative_error(found[name], expected) <= 1e-6
    assert found.keys() == adapter.modules.keys()


def test_a_configuration_is_bounded(plain: Path) -> None:
    file = plain / CONFIG_FILE
    settings_ = json.loads(file.read_text())
    deep = "[" * 40 + "]" * 40
    file.write_text(json.dumps(settings_)[:-1] + f', "auto_mapping": {{"a": {deep}}}}}')
    with pytest.raises(InputError, match="levels deep"):
        csulora.load_adapter(plain)
    file.write_text(json.dumps(settings_)[:-1] + ', "lora_dropout": 1e999}')
    with pytest.raises(InputError, match="lora_dropout is 1e999; write a finite number"):
        csulora.load_adapter(plain)


def test_messages_are_one_bounded_line() -> None:
    message = str(InputError(f"{'x' * 10_000_000}\n\x1b[2J\u202e: the end; do this"))
    assert message.isprintable()
    assert len(message) < 3000
    assert message.endswith("the end; do this")
