"""Reads what a plan needs from an accelerate YAML or a DeepSpeed JSON, and writes the configuration that a plan advises."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_minis.config_sources import SECTION, read_section

_BY_LAYERS = "TRANSFORMER_BASED_WRAP"
_ALLOWED = "an accelerate YAML (with distributed_type) or a DeepSpeed JSON (with zero_optimization) is allowed"
ENGINES = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp2", "DEEPSPEED": "zero0"}
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "cpuadam": "adamw", "fusedadam": "adamw", "sgd": "sgd"}

_NUMBERS = {"accumulation": "gradient_accumulation_steps", "batch": "train_micro_batch_size_per_gpu"}
_SIZES = {
    "bucket": "reduce_bucket_size",
    "reuse_distance": "stage3_max_reuse_distance",
    "live_parameters": "stage3_max_live_parameters",
}


def load_mapping(path: str | Path) -> dict[str, Any]:
    """The content of a YAML or JSON file, a mapping.

    Raises:
        ValueError: no such file, or it holds something else; the message names it, and the line of a syntax error.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
    except Exception as error:  # yaml's
        raise ValueError(f"{str(path)!r} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r}: a mapping is allowed, got {type(content).__name__}")
    return content


def deepspeed_file(content: Mapping[str, Any], path: Path) -> Path | None:
    """The DeepSpeed JSON that an accelerate YAML names; None if it names none.

    Args:
        path: the YAML's. A relative name is looked for from here, from beside it, and from the folder above.

    Raises:
        ValueError: it is not there.
    """
    nested = content.get("deepspeed_config")
    named = nested.get("deepspeed_config_file") if isinstance(nested, Mapping) else None
    if not named:
        return None
    places = Path(named), path.parent / named, path.parent.parent / named
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise ValueError(f"{str(path)!r} names the DeepSpeed configuration {named!r}, which is not there")
    return place


@dataclass(frozen=True)
class ConfigurationFile:
    """An accelerate YAML or a DeepSpeed JSON that a plan is read from; it and the JSON that it names are read once."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> ConfigurationFile:
        """Raises ValueError, as `load_mapping` does."""
        return cls(Path(path), load_mapping(path))

    @property
    def is_accelerate(self) -> bool:
        return "distributed_type" in self.content

    @functools.cached_property
    def named(self) -> ConfigurationFile | None:
        """The DeepSpeed JSON that an accelerate YAML names.

        Raises:
            ValueError: it is not there, or is no JSON.
        """
        place = deepspeed_file(self.content, self.path) if self.is_accelerate else None
        return ConfigurationFile.read(place) if place else None

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """Fields of a `Setup` that the file states: engine, gpus, settings, offloading, accumulation, optimizer.

        Raises:
            ValueError: it is neither, or its mini-sequence settings are wrong.
        """
        content = self.content
        if self.is_accelerate:
            return _read_accelerate(self)
        if "zero_optimization" in content or any("batch_size" in key for key in content) or SECTION in content:
            return read_deepspeed(content, str(self.path))
        raise ValueError(f"{str(self.path)!r}: {_ALLOWED}, got the keys {', '.join(map(str, content)) or 'of nothing'}")

    def assumptions(self, gpus: int, given: bool) -> list[str]:
        """What a plan for so many GPUs, a number that was given or not, takes for granted and the file does not say."""
        content, found = self.content, []
        if not given and not isinstance(content.get("num_processes"), int):
            found.append(f"{str(self.path)!r} names no number of processes: planned for {gpus} (--gpus)")
        fsdp = content.get("fsdp_config") or {}
        if str(content.get("distributed_type")).upper() == "FSDP" and str(fsdp.get("fsdp_version", 1)) != "2":
            found.append(f"{str(self.path)!r} is of FSDP1: planned as FSDP2")
        return found


def _read_accelerate(file: ConfigurationFile) -> dict[str, Any]:
    content, path = file.content, file.path
    kind = str(content["distributed_type"]).upper()
    if kind not in ENGINES:
        raise ValueError(f"{str(path)!r}: distributed_type {', '.join(ENGINES)} can be planned, got {kind!r}")
    found: dict[str, Any] = {"engine": ENGINES[kind]}
    if isinstance(content.get("num_processes"), int):
        found["gpus"] = content["num_processes"]
    if kind == "DEEPSPEED":
        found |= _read_stage(file)
    if kind == "FSDP":
        found |= _read_fsdp(content.get("fsdp_config") or {}, path)
    return found | _settings(content, str(path), found.get("settings"))


def _read_fsdp(fsdp: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What is planned is FSDP2 whose units are the layers, and are freed after each use."""
    for key in ("fsdp_reshard_after_forward", "fsdp_sharding_strategy"):
        if str(fsdp.get(key, True)).upper() not in ("TRUE", "1", "FULL_SHARD"):
            raise ValueError(f"{str(path)!r}: {key} true or FULL_SHARD can be planned, got {fsdp[key]!r}")
    if str(fsdp.get("fsdp_auto_wrap_policy", _BY_LAYERS)).upper() != _BY_LAYERS:
        raise ValueError(
            f"{str(path)!r}: fsdp_auto_wrap_policy {_BY_LAYERS} can be planned, got {fsdp['fsdp_auto_wrap_policy']!r}"
        )
    return {"offload_param": True} if fsdp.get("fsdp_offload_params") in (True, "true", "True") else {}


def _read_stage(file: ConfigurationFile) -> dict[str, Any]:
    if file.named is not None:
        return read_deepspeed(file.named.content, str(file.named.path))
    nested = file.content.get("deepspeed_config") or {}
    found: dict[str, Any] = {"engine": f"zero{nested.get('zero_stage', 2)}"}
    if nested.get("offload_optimizer_device") in ("cpu", "nvme"):
        found["offload_optimizer"] = True
    if nested.get("offload_param_device") in ("cpu", "nvme"):
        found["offload_param"] = True
    if isinstance(nested.get("gradient_accumulation_steps"), int):
        found["accumulation"] = nested["gradient_accumulation_steps"]
    return found


def read_deepspeed(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of a `Setup` that a DeepSpeed JSON states."""
    zero = content.get("zero_optimization") or {}
    found: dict[str, Any] = {"engine": f"zero{zero.get('stage', 0)}"}
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") in ("cpu", "nvme"):
            found[name] = True
    for field, name in _SIZES.items():
        if isinstance(zero.get(name), int | float):
            found[field] = int(zero[name])
    for field, name in _NUMBERS.items():
        if isinstance(content.get(name), int):
            found[field] = content[name]
    optimizer = str((content.get("optimizer") or {}).get("type", "")).lower()
    if optimizer in _OPTIMIZERS:
        found["optimizer"] = _OPTIMIZERS[optimizer]
    return found | _settings(content, source, None)


def _settings(content: Mapping[str, Any], source: str, other: dict[str, Any] | None) -> dict[str, Any]:
    request = read_section(content, source)
    own = request.config.to_dict(defaults=False) if request else None
    return {"settings": own or other or {}}


def write_configuration(plan: Any, folder: str | Path, source: ConfigurationFile | None) -> list[Path]:
    """Writes the advised configuration: an accelerate YAML, and for ZeRO the DeepSpeed JSON that it names.

    Args:
        plan: a `compare.Plan` with a best row; else nothing is written.
        source: the file that the plan was read from; what it says beside the settings is kept.
    """
    row = plan.best or (plan.gpus_needed[1] if plan.gpus_needed else None)
    if row is None or row.candidate.setup.settings is None:
        return []
    setup, folder = row.candidate.setup, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    section = dict(setup.settings) or True
    own_yaml = source.content if source and source.is_accelerate else {}
    own_json = source.content if source and not own_yaml else {}
    if source and source.named:
        own_json = source.named.content
    written = []
    same_engine = bool(own_yaml) and source.fields["engine"] == setup.engine
    content = {key: value for key, value in own_yaml.items() if key not in _OF_ENGINE}
    content = {"compute_environment": "LOCAL_MACHINE", **content, "num_processes": setup.gpus}
    if setup.engine.startswith("zero"):
        written.append(folder / "deepspeed.json")
        nested = {key: value for key, value in (own_yaml.get("deepspeed_config") or {}).items() if key in _IN_JSON}
        precision = content.pop("mixed_precision", "no")  # accelerate refuses it beside a JSON
        if precision in ("bf16", "fp16"):
            nested[precision] = {"enabled": True}
        text = json.dumps(_deepspeed(setup, {**nested, **own_json}) | {SECTION: section}, indent=2)
        written[0].write_text(text + "\n", encoding="utf-8")
        named = {"deepspeed_config_file": str(written[0]), "zero3_init_flag": setup.engine == "zero3"}
        content |= {"distributed_type": "DEEPSPEED", "deepspeed_config": named}
    else:
        content |= _accelerate(setup, own_yaml if same_engine else {}) | {SECTION: section}
    import yaml

    path = folder / "accelerate.yaml"
    cards = f"{setup.gpus} x {plan.gpu_memory:g} GB"
    header = f"# {row.candidate.name}: {row.estimate.tokens:,} tokens of {plan.model} on {cards}.\n"
    launch = f"#   accelerate launch --config_file {path} train.py ...\n"
    path.write_text(header + launch + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return [path, *written]


_IN_JSON = "gradient_accumulation_steps", "gradient_clipping"
_OF_ENGINE = SECTION, "distributed_type", "num_processes", "deepspeed_config", "fsdp_config"


def _deepspeed(setup: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed JSON: the user's own, where it says nothing else than the setup."""
    stage = int(setup.engine[-1])
    zero: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    zero |= {**(own.get("zero_optimization") or {}), "stage": stage}
    for name in ("offload_optimizer", "offload_param"):
        if not getattr(setup, name):
            zero.pop(name, None)
        elif (zero.get(name) or {}).get("device") not in ("cpu", "nvme"):
            zero[name] = {"device": "cpu", "pin_memory": True}
    auto = "gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"
    content = {
        **({} if "fp16" in own else {"bf16": {"enabled": "auto"}}),
        **dict.fromkeys(auto, "auto"),
        **own,
        "zero_optimization": zero,
    }
    for field, name in _NUMBERS.items():
        if isinstance(content[name], int):
            content[name] = getattr(setup, field)
            content["train_batch_size"] = "auto"  # their product
    return content


def _accelerate(setup: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    if setup.engine != "fsdp2":
        return {"distributed_type": "MULTI_GPU" if setup.engine == "ddp" else "NO"}
    fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": _BY_LAYERS, "fsdp_reshard_after_forward": True}
    fsdp |= {"fsdp_state_dict_type": "FULL_STATE_DICT", **(own.get("fsdp_config") or {})}
    if setup.offload_param or "fsdp_offload_params" in fsdp:
        fsdp["fsdp_offload_params"] = setup.offload_param
    return {"distributed_type": "FSDP", "fsdp_config": fsdp}
