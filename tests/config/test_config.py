import dataclasses
import json
import pickle

import pytest

from ds_minis import MiniSequenceConfig
from ds_minis.environment import autoload_enabled, process_rank

DEFAULTS = {
    "enabled": True,
    "scope": "layer",
    "chunk_size": "auto",
    "num_mini_sequences": None,
    "loss": True,
    "loss_chunk_size": "auto",
    "return_logits": False,
    "tile_inference": False,
    "head_groups": 1,
    "offload": None,
    "keep": "auto",
    "memory_budget": None,
    "sequence_parallel": 1,
    "include": [],
    "exclude": [],
}
OTHER = {
    "enabled": False,
    "scope": "tokens",  # which three of the others do not go with
    "chunk_size": 7,
    "num_mini_sequences": 3,
    "loss": False,
    "loss_chunk_size": 5,
    "return_logits": True,
    "tile_inference": True,
    "head_groups": 2,
    "offload": "cpu",
    "keep": "attention",
    "memory_budget": 2.5,
    "sequence_parallel": {"size": 4, "mode": {"ulysses": 2, "ring": 2}},
    "include": ["*.mlp"],
    "exclude": ["*.layers.0.*", "norm"],
}
BOOL, SIZE, COUNT = "true or false", 'a whole number of tokens from 1 or "auto"', "a whole number from 1"
SCOPE, PATTERNS = '"mlp" or "tokens" or "layer"', "a list of name patterns"
NOT_A_BOOL = [1, 0, "true", None, []]
NOT_A_COUNT = ["8", True, False, 0, -1, 8.0, 1.5, [8]]
WRONG = [
    *[(key, value, BOOL) for key, default in DEFAULTS.items() if isinstance(default, bool) for value in NOT_A_BOOL],
    *[("scope", value, SCOPE) for value in ("layers", "MLP", "", None, True, 1, ["mlp"])],
    *[(key, value, SIZE) for key in ("chunk_size", "loss_chunk_size") for value in [*NOT_A_COUNT, None, "Auto", ""]],
    *[("num_mini_sequences", value, COUNT) for value in [*NOT_A_COUNT, "auto"]],
    *[(key, value, PATTERNS) for key in ("include", "exclude") for value in ("*.mlp", None, 1, [1], [""], {"*": 1})],
]


def test_defaults():
    assert MiniSequenceConfig().to_dict() == DEFAULTS
    assert MiniSequenceConfig().to_dict(defaults=False) == {}


def test_every_field_is_documented():
    assert all(field.metadata["doc"].endswith(".") for field in dataclasses.fields(MiniSequenceConfig))


@pytest.mark.parametrize("key", OTHER)
def test_only_what_differs_from_the_default_is_left_without_defaults(key):
    config = MiniSequenceConfig(**{key: OTHER[key]})
    assert config.to_dict(defaults=False) == {key: OTHER[key]}
    assert config.to_dict() == {**DEFAULTS, key: OTHER[key]}


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("key", OTHER)
def test_settings_survive_a_round_trip_through_json(key, defaults):
    config = MiniSequenceConfig(**{key: OTHER[key]})
    assert MiniSequenceConfig.from_value(json.loads(json.dumps(config.to_dict(defaults=defaults)))) == config


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, {}), (None, {}), ({}, {}), (False, {"enabled": False}), ({"chunk_size": 4}, {"chunk_size": 4})],
)
def test_from_value_of_what_a_source_may_hold(value, expected):
    assert MiniSequenceConfig.from_value(value) == MiniSequenceConfig(**expected)


def test_from_value_gives_back_an_instance():
    config = MiniSequenceConfig(chunk_size=4)
    assert MiniSequenceConfig.from_value(config) is config


def test_frozen_hashable_keyword_only_and_picklable():
    config = MiniSequenceConfig(include=["*.mlp"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_size = 4
    with pytest.raises(ValueError, match="settings are keywords here"):
        MiniSequenceConfig(True)
    assert {config, pickle.loads(pickle.dumps(config))} == {MiniSequenceConfig(include=("*.mlp",))}


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG, ids=lambda value: repr(value)[:20])
def test_wrong_value_names_source_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError) as error:
        MiniSequenceConfig.from_value({key: value}, source="the settings file")
    assert str(error.value).startswith(f"the settings file: {key}: {allowed} is allowed")
    assert f"got {value!r} ({type(value).__name__})" in str(error.value)
    with pytest.raises(ValueError, match=f"^{key}: "):
        MiniSequenceConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("scope", "layers", '"layer"'),
        ("scope", "token", '"tokens"'),
        ("scope", 3, None),
        ("chunk_size", 0, "1"),
        ("chunk_size", "4096", "4096"),
        ("chunk_size", 4096.0, "4096"),
        ("chunk_size", True, None),
        ("chunk_size", float("nan"), None),
        ("num_mini_sequences", -3, "1"),
        ("head_groups", "Auto", '"auto"'),
        ("offload", "CPU", '"cpu"'),
        ("offload", "disk", None),
        ("loss", "yes", "true"),
        ("loss", 0, "false"),
        ("include", "*.mlp", '["*.mlp"]'),
    ],
)
def test_the_nearest_value_that_is_allowed_is_named(key, value, meant):
    with pytest.raises(ValueError) as error:
        MiniSequenceConfig(**{key: value})
    message = str(error.value)
    assert message.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["true", 1, 0, 1.0, [], [("chunk_size", 4)]])
def test_neither_a_bool_nor_a_mapping_is_refused(value):
    with pytest.raises(ValueError) as error:
        MiniSequenceConfig.from_value(value, source="the settings file")
    assert str(error.value) == (
        f"the settings file: true, false or a mapping of settings is allowed, got {value!r} ({type(value).__name__})"
    )


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("chunksize", "chunk_size"),
        ("CHUNK_SIZE", "chunk_size"),
        ("loss_chunk", "loss_chunk_size"),
        ("num_minisequences", "num_mini_sequences"),
        ("num_mini_sequence", "num_mini_sequences"),
        ("enable", "enabled"),
        ("returnlogits", "return_logits"),
        ("excludes", "exclude"),
        ("xyz", None),
        (7, None),
    ],
)
def test_unknown_key_names_source_key_value_all_keys_and_the_nearest(key, meant):
    with pytest.raises(ValueError) as error:
        MiniSequenceConfig.from_value({"loss": False, key: 1234}, source="the settings file")
    message = str(error.value)
    assert message.startswith(f"the settings file: unknown key {key!r} (value 1234)")
    assert message.endswith(f"allowed keys: {', '.join(DEFAULTS)}")
    assert f'did you mean "{meant}"?' in message if meant else "did you mean" not in message


def test_an_unknown_keyword_is_an_unknown_key():
    with pytest.raises(
        ValueError, match=r"^unknown key 'chunksize' \(value 8\); did you mean \"chunk_size\"\?; allowed keys: "
    ):
        MiniSequenceConfig(chunksize=8)


def test_chunk_size_together_with_num_mini_sequences_is_refused():
    with pytest.raises(ValueError, match=r"^the settings file: chunk_size=8 and num_mini_sequences=2 .* give one"):
        MiniSequenceConfig.from_value({"chunk_size": 8, "num_mini_sequences": 2}, source="the settings file")
    assert MiniSequenceConfig(chunk_size="auto", num_mini_sequences=2, loss_chunk_size=8).num_mini_sequences == 2


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_patterns_are_a_list_or_a_tuple_and_are_kept_as_a_tuple(key):
    patterns = ["*.layers.0.mlp", "norm"]
    configs = [MiniSequenceConfig(**{key: kind(patterns)}) for kind in (list, tuple)]
    assert configs[0] == configs[1] and getattr(configs[0], key) == tuple(patterns)
    assert configs[0].to_dict()[key] == patterns


@pytest.mark.parametrize(
    ("value", "enabled"), [(None, True), ("1", True), ("0", False), ("False", False), ("off", False)]
)
def test_autoload_variable(monkeypatch, value, enabled):
    monkeypatch.delenv("DS_MINIS_AUTOLOAD", raising=False)
    if value is not None:
        monkeypatch.setenv("DS_MINIS_AUTOLOAD", value)
    assert autoload_enabled() is enabled


@pytest.mark.parametrize(("value", "rank"), [(None, 0), ("3", 3), ("", 0), ("none", 0)])
def test_rank_variable(monkeypatch, value, rank):
    monkeypatch.delenv("RANK", raising=False)
    if value is not None:
        monkeypatch.setenv("RANK", value)
    assert process_rank() == rank


@pytest.mark.parametrize("source", [MiniSequenceConfig.from_value, lambda settings: MiniSequenceConfig(**settings)])
def test_a_setting_that_is_no_more_says_what_to_set_instead(source):
    with pytest.raises(ValueError, match='checkpoint_every=2: it was removed in November 2026.*set "offload": "cpu"'):
        source({"checkpoint_every": 2})
