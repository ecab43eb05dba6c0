import base64
import inspect
import json
import types

import deepspeed
import pytest
from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime import constants
from deepspeed.utils import set_z3_leaf_module, z3_leaf_module, z3_leaf_parameter
from models import add_lora, build
from torch import nn
from transformers import TrainingArguments

from ds_minis import MiniSequenceConfig, convert_to_mini_sequence, mini_sequence_report
from ds_minis.config_sources import Request, read_section
from ds_minis.convert import tiled_modules
from ds_minis.integrations.deepspeed import attach_initialize, attach_zero3
from ds_minis.tiling.modules.swap import Tiled

pytestmark = pytest.mark.usefixtures("clean_accelerate_state")
SETTINGS = {"chunk_size": 6, "loss_chunk_size": 5}
ENGINE = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
REAL_KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler fp16
bf16 amp torch_autocast zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
communication_data_type seq_parallel_communication_data_type sequence_parallel_size data_parallel_size tensor_parallel
pipeline hybrid_engine prescale_gradients gradient_predivide_factor sparse_gradients sparse_attention steps_per_print
wall_clock_breakdown memory_breakdown dump_state disable_allgather dataloader_drop_last activation_checkpointing
checkpoint aio nebula compile tensorboard wandb csv_monitor comet comms_logger flops_profiler autotuning elasticity
compression_training curriculum_learning data_efficiency data_types progressive_layer_drop eigenvalue
quantize_training timers use_data_before_expert_parallel_parallelism zero_quantized_weights graph_harvesting
mics_shard_size
""".split()
BAD_SECTIONS = [
    ({"mini_sequnce": True}, ["'mini_sequnce'", "True", 'did you mean "mini_sequence"?']),
    ({"mini_sequence": {"chunk_size": "8"}}, ['"mini_sequence": chunk_size', "'8' (str)", 'from 1 or "auto"']),
    ({"mini_sequence": {"chunk_size": 0}}, ['"mini_sequence": chunk_size', "got 0", 'from 1 or "auto"']),
    ({"mini_sequence": {"chunksize": 8}}, ["unknown key 'chunksize'", "value 8", 'did you mean "chunk_size"?']),
    ({"mini_sequence": "yes"}, ["true, false or a mapping", "'yes'"]),
]
bad_sections = pytest.mark.parametrize(("section", "words"), BAD_SECTIONS)


@pytest.fixture
def ds_json(tmp_path):
    def write(config: dict) -> str:
        (tmp_path / "zero2.json").write_text(json.dumps(config))
        return str(tmp_path / "zero2.json")

    return write


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        (dict.fromkeys(REAL_KEYS, 1), None),
        ({"mini_sequence": True}, {}),
        ({"mini_sequence": {}}, {}),
        ({"mini_sequence": None}, {}),
        ({"mini_sequence": False}, {"enabled": False}),
        ({**ENGINE, "mini_sequence": SETTINGS}, SETTINGS),
    ],
    ids=lambda value: str(value)[:40],
)
def test_section_is_read(config, expected):
    assert read_section(config, "a file") == (
        None if expected is None else Request(MiniSequenceConfig(**expected), "a file")
    )


def test_no_key_that_deepspeed_knows_is_taken_for_a_misspelling():
    known = {value for value in vars(constants).values() if isinstance(value, str) and value.isidentifier()}
    assert len(known) > 50
    assert read_section(dict.fromkeys(known), "a file") is None


@pytest.mark.parametrize(
    "key",
    ["mini_sequnce", "mini_sequnce_size", "mini_sequences", "minisequence", "mini-sequence", "MINI_SEQUENCE"],
)
@pytest.mark.parametrize("beside", [{}, {"mini_sequence": True}])
def test_misspelt_section_names_source_key_value_and_the_right_name(key, beside):
    with pytest.raises(ValueError) as error:
        read_section({**beside, key: {"chunk_size": 8}}, "DeepSpeed config a.json")
    message = str(error.value)
    assert message.startswith(f"DeepSpeed config a.json: unknown key {key!r} (value {{'chunk_size': 8}})")
    assert 'did you mean "mini_sequence"?' in message and "true, false or a mapping of enabled, scope" in message


@bad_sections
def test_wrong_values_name_the_source_and_the_section(section, words):
    with pytest.raises(ValueError) as error:
        read_section(section, "DeepSpeed config a.json")
    assert str(error.value).startswith("DeepSpeed config a.json")
    assert all(word in str(error.value) for word in words)


@bad_sections
@pytest.mark.parametrize("read", [DeepSpeedPlugin, TrainingArguments], ids=["accelerate", "trainer"])
def test_accelerate_and_trainer_refuse_a_wrong_file_when_they_read_it(tmp_path, ds_json, read, section, words):
    path = ds_json({**ENGINE, **section})
    with pytest.raises(ValueError) as error:
        if read is DeepSpeedPlugin:
            read(hf_ds_config=path)
        else:
            read(str(tmp_path), deepspeed=path, use_cpu=True, report_to=[])
    assert str(error.value).startswith(f"DeepSpeed config {path}")
    assert all(word in str(error.value) for word in words)


@bad_sections
def test_accelerate_refuses_a_wrong_dictionary(section, words):
    with pytest.raises(ValueError, match="^DeepSpeed config") as error:
        DeepSpeedPlugin(hf_ds_config={**ENGINE, **section})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(
    "section",
    [
        True,
        False,
        SETTINGS,
        {"chunk_size": "auto"},
        {"chunk_size": "auto", "loss_chunk_size": "auto", "include": ["*.mlp"]},
        {"chunk_size": 9, "loss_chunk_size": "auto"},
    ],
)
def test_section_survives_accelerate_which_fills_in_every_auto(ds_json, section, as_file):
    config = {**ENGINE, "mini_sequence": section}
    plugin = DeepSpeedPlugin(hf_ds_config=ds_json(config) if as_file else config)
    plugin.deepspeed_config_process(must_match=True, **{"gradient_clipping": 1.0})
    assert read_section(plugin.deepspeed_config, "a file").config == MiniSequenceConfig.from_value(section)
    assert config == {**ENGINE, "mini_sequence": section}


def test_section_survives_training_arguments(tmp_path, ds_json):
    path = ds_json({**ENGINE, "mini_sequence": {"chunk_size": "auto", "loss": False}})
    arguments = TrainingArguments(str(tmp_path), deepspeed=path, use_cpu=True, report_to=[])
    config = arguments.deepspeed_plugin.deepspeed_config
    assert read_section(config, "a file").config == MiniSequenceConfig(loss=False)


def test_configs_without_a_section_stay_as_they_are():
    assert "mini_sequence" not in DeepSpeedPlugin(hf_ds_config=ENGINE).deepspeed_config


def leaves(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if z3_leaf_module(module)}


def tiled(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Tiled)}


def engine_class() -> type:
    """A class to be wrapped in the place of DeepSpeed's own."""
    return type("DeepSpeedEngine", (), {"deepspeed_io": lambda self, dataset, **_: dataset})


class Engine:
    """Stands for deepspeed: an `initialize` of the same signature that notes what it was given, and starts nothing."""

    def __init__(self):
        self.calls = []

        def initialize(
            args=None, model=None, optimizer=None, model_parameters=None, training_data=None, lr_scheduler=None,
            distributed_port=29500, mpu=None, dist_init_required=None, collate_fn=None, config=None, mesh_param=None,
            config_params=None,
        ):  # fmt: skip
            self.calls.append((mini_sequence_report(model), args, optimizer, config, config_params))
            return model

        self.module = types.SimpleNamespace(initialize=initialize, DeepSpeedEngine=engine_class())
        attach_initialize(self.module)

    def initialize(self, *args, **kwargs):
        return self.module.initialize(*args, **kwargs)


def test_the_stand_in_has_the_signature_of_deepspeed():
    names = list(inspect.signature(inspect.unwrap(deepspeed.initialize)).parameters)
    assert list(inspect.signature(Engine().module.initialize).parameters) == names


def base64_of(config: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(config).encode()).decode()


SOURCES = {
    "dict": lambda config, path: {"config": config},
    "path": lambda config, path: {"config": path},
    "base64": lambda config, path: {"config": base64_of(config)},
    "config_params": lambda config, path: {"config_params": config},
    "config_params path": lambda config, path: {"config_params": path},
    "args": lambda config, path: {"args": types.SimpleNamespace(deepspeed_config=path)},
    "args beside none": lambda config, path: {"args": types.SimpleNamespace(deepspeed_config=config), "config": None},
}
sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


@sources
def test_initialize_converts_the_model_before_the_engine_sees_it(ds_json, source):
    engine, model = Engine(), build("llama")
    config = {**ENGINE, "mini_sequence": SETTINGS}
    arguments = source(config, ds_json(config))
    assert engine.initialize(model=model, optimizer="adam", **arguments) is model
    ((report, *given),) = engine.calls
    assert report.config == MiniSequenceConfig(**SETTINGS) and report.source.startswith("DeepSpeed config")
    assert given == [arguments.get("args"), "adam", arguments.get("config"), arguments.get("config_params")]
    assert len(tiled(model)) == 9


@sources
@bad_sections
def test_initialize_refuses_a_wrong_section_before_the_engine(ds_json, source, section, words):
    engine, model = Engine(), build("llama")
    config = {**ENGINE, **section}
    with pytest.raises(ValueError, match="^DeepSpeed config") as error:
        engine.initialize(model=model, **source(config, ds_json(config)))
    assert all(word in str(error.value) for word in words)
    assert not engine.calls and mini_sequence_report(model) is None


@pytest.mark.parametrize("text", ["{%s, # a comment\n}", "{%s,}"])
def test_initialize_reads_what_deepspeed_reads_also_the_relaxed_json_it_allows(tmp_path, text):
    (tmp_path / "zero2.json").write_text(text % '"train_batch_size": 1, "mini_sequence": true')
    engine, model = Engine(), build("llama")
    engine.initialize(model=model, config=str(tmp_path / "zero2.json"))
    assert mini_sequence_report(model) is not None


def test_initialize_takes_positional_arguments():
    engine = Engine()
    engine.initialize(types.SimpleNamespace(deepspeed_config={"mini_sequence": SETTINGS}), build("llama"))
    assert engine.calls[0][0].config == MiniSequenceConfig(**SETTINGS)


@pytest.mark.parametrize("config", [None, ENGINE, {"mini_sequence": False}], ids=str)
def test_initialize_without_mini_sequences_leaves_the_model_alone(config):
    engine, model = Engine(), build("llama")
    engine.initialize(model=model, config=config)
    ((report, *_, given, _),) = engine.calls
    assert (report is None or not report.config.enabled) and given is config and not tiled(model)
    assert not leaves(model)


@pytest.mark.parametrize("config", ["no such file", 7])
def test_what_deepspeed_cannot_read_is_refused_in_its_own_words(config):
    engine, model = Engine(), build("llama")
    with pytest.raises(ValueError, match="Expected a string path to an existing deepspeed config"):
        engine.initialize(model=model, config=config)
    assert mini_sequence_report(model) is None


@pytest.mark.parametrize("config", [ENGINE, {"mini_sequence": True}], ids=["off", "on"])
def test_a_missing_model_is_left_to_deepspeed(config):
    initialize = inspect.unwrap(deepspeed.initialize)
    engine = types.SimpleNamespace(initialize=initialize, DeepSpeedEngine=engine_class())
    attach_initialize(engine)
    with pytest.raises(AssertionError, match="requires a model"):
        engine.initialize(config=config)


def test_other_settings_in_python_and_in_the_file_are_shown_with_both_sources(ds_json):
    engine, model = Engine(), convert_to_mini_sequence(build("llama"), SETTINGS)
    path = ds_json({"mini_sequence": {"chunk_size": 7}})
    with pytest.raises(ValueError, match="different mini-sequence settings") as error:
        engine.initialize(model=model, config=path)
    asked, other = MiniSequenceConfig(**SETTINGS).to_dict(), MiniSequenceConfig(chunk_size=7).to_dict()
    asked, other = ({k: v for k, v in d.items() if asked[k] != other[k]} for d in (asked, other))
    assert asked and f"convert_to_mini_sequence: {asked}\n" in str(error.value)
    assert f"DeepSpeed config {path}: {other}\n" in str(error.value)
    assert not engine.calls
    engine.initialize(model=model, config={"mini_sequence": SETTINGS})
    assert engine.calls[0][0].source == "convert_to_mini_sequence"


@pytest.mark.parametrize("in_python", [False, True])
@pytest.mark.parametrize(
    ("settings", "head"),
    [({}, {"lm_head"}), ({"loss": False}, set()), ({"scope": "mlp"}, {"lm_head"}), ({"exclude": ["*"]}, {"lm_head"})],
)
def test_zero3_gathers_tiled_modules_and_the_lm_head_as_a_whole(settings, head, in_python):
    model = build("qwen3")
    if in_python:
        convert_to_mini_sequence(model, settings)
    Engine().initialize(model=model, config=ENGINE if in_python else {"mini_sequence": settings})
    assert not leaves(model)  # which a DeepSpeed that is not ZeRO-3 has no use for
    assert set_up_for_zero3(model) == leaves(model) == tiled(model) | head


def test_zero3_gathers_an_adapted_lm_head_as_a_whole():
    model = add_lora(build("llama"), target_modules=["lm_head", "down_proj"])
    convert_to_mini_sequence(model)
    assert set_up_for_zero3(model) == leaves(model) == tiled(model) | {"base_model.model.lm_head"}


def test_zero3_gathers_other_leaf_modules_as_their_owner_asked():
    model = build("llama")
    set_z3_leaf_module(model.model.embed_tokens, True)
    assert set_up_for_zero3(model) == {"model.embed_tokens"}
    assert [n for n, p in model.named_parameters() if z3_leaf_parameter(p)] == ["model.embed_tokens.weight"]


def set_up_for_zero3(model: nn.Module) -> set[str]:
    """Names of the leaf modules that DeepSpeed saw when it set a model up, of which no parameter is a leaf's if it is tiled.

    By a stand-in for the class that does it: leaf modules are noted, and their parameters marked, as DeepSpeed does.
    """
    seen = set()

    class Offload:
        def __init__(self, module):
            self.module, self.forward_hooks, self.backward_hooks = module, [], []
            self.setup_zero_stage3_hooks()

        def setup_zero_stage3_hooks(self):
            for name, module in self.module.named_modules():
                if z3_leaf_module(module):
                    seen.add(name)
                    for param in module.parameters():
                        param.ds_z3_leaf_module = module

    attach_zero3(types.SimpleNamespace(DeepSpeedZeRoOffload=Offload))
    Offload(model)
    assert not any(z3_leaf_parameter(p) for module in tiled_modules(model) for p in module.parameters())
    return seen
