"""Targeting and pattern rules, against PEFT's own functions on random configs."""

import time

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loramux_adapters import AdapterError
from loramux_adapters.peft.config import parse_config
from loramux_adapters.peft.targets import Targets

from ..checkpoints import make_config

MODULES = [
    f"{stack}.{layer}.{module}"
    for stack in ("model.layers", "transformer.h", "vision.model.layers")
    for layer in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.1.up_proj", "my_q_proj")
]
SUFFIXES = ["q_proj", "proj", "self_attn.q_proj", "up_proj", "1.up_proj", "my_q_proj", *MODULES[:4], "absent"]
REGEXES = [
    r".*q_proj",
    r".*\.1\.up_proj",
    r".*layers\.(0|10)\.self_attn\.(?:q|k)_proj",
    r"[a-z]+\.h\..*",
    r"(?i).*UP.*",
]
KEYS = [
    *SUFFIXES,
    *(r for r in REGEXES if "(?i)" not in r),
    r"^model.layers.0.self_attn.q_proj",
    "mlp.*",
    "q.proj|k_proj",
]

targets = st.one_of(st.sampled_from(REGEXES), st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=4))


@settings(max_examples=200, deadline=None)
@given(
    target=targets,
    exclude=st.one_of(st.none(), targets, st.just([])),
    layers=st.one_of(st.none(), st.sampled_from([0, 1, 10]), st.lists(st.sampled_from([0, 1, 11]), max_size=2)),
    pattern=st.sampled_from([None, [], "layers", ["h", "layers"], ["absent"], r"(?:layers|h)", "layers|h", "experts"]),
)
def test_targets_are_those_of_peft(target, exclude, layers, pattern):
    if isinstance(target, str):
        layers = None
    fields = {
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else pattern,
    }
    reference = peft.LoraConfig(**fields)
    expected = {module for module in MODULES if check_target_module_exists(reference, module)}
    assert Targets(parse_config(make_config(**fields))).select(MODULES) == expected


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(st.sampled_from(KEYS), st.integers(-9, 9), max_size=4),
)
def test_ranks_and_alphas_are_those_of_peft(ranks, alphas):
    resolved = Targets(parse_config(make_config(r=77, lora_alpha=88, rank_pattern=ranks, alpha_pattern=alphas)))
    for module in MODULES:
        assert resolved.rank(module) == ranks.get(get_pattern_key(ranks.keys(), module), 77)
        assert resolved.alpha(module) == alphas.get(get_pattern_key(alphas.keys(), module), 88)
    used = {key for key, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)) for _ in table}
    assert {field for field, _ in resolved.unused_patterns()} <= used


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{e<=1}", "[[:alpha:]]+", "*", "(?P<idx>a)(?P<idx>b)", "x" * 70_000, "(" * 30_000, "a{1,99999999999}"],
)
def test_patterns_that_re_and_regex_do_not_share_are_refused(pattern):
    with pytest.raises(AdapterError) as refusal:
        Targets(parse_config(make_config(target_modules=pattern))).select(MODULES)
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", "target_modules")
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_would_run_for_ever_is_stopped(field, monkeypatch):
    monkeypatch.setattr("loramux_adapters.peft.patterns.BUDGET_S", 0.3)
    bomb = r"(.|..)*(?<=\d)"
    config = parse_config(make_config(**{field: {bomb: 3} if field == "rank_pattern" else bomb}))
    before = time.monotonic()
    with pytest.raises(AdapterError) as refusal:
        resolved = Targets(config)
        resolved.select([f"model.{'layers.' * 20}q_proj"])
        resolved.rank(f"model.{'layers.' * 20}q_proj")
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)
    assert time.monotonic() - before < 5


def test_what_is_warned_of_does_not_depend_on_the_order_of_a_set():
    modules = [f"model.layers.{layer}.q_proj" for layer in range(99)]
    resolved = Targets(parse_config(make_config(alpha_pattern={"q_proj": 1, r".*q_pro.": 2})))
    resolved.resolve(modules)
    assert resolved.ambiguous == {"alpha_pattern": "model.layers.0.q_proj"}


def test_many_full_names_as_keys_stay_fast():
    """EVA writes a rank for every module of the model."""
    names = [f"model.layers.{layer}.{m}" for layer in range(80) for m in ("q", "k", "v", "o", "gate", "up", "down")]
    resolved = Targets(parse_config(make_config(rank_pattern={name: i + 1 for i, name in enumerate(names)})))
    assert [resolved.rank(name) for name in names] == list(range(1, len(names) + 1))
