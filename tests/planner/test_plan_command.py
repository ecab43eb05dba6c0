"""`ds-minis plan`: what it prints, its exit status, what it reads and writes. A small model: seconds in all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, LlamaConfig

from ds_minis.cli import main
from ds_minis.cli.command import make_parser
from ds_minis.planner.inputs import files
from ds_minis.planner.inputs.files import ConfigurationFile, write_configuration
from ds_minis.planner.inputs.models import MODELS, known_name
from ds_minis.planner.inputs.setup import Setup
from ds_minis.planner.plan.compare import UNIT, Plan, compare
from ds_minis.planner.plan.planner import FITS

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES, num_key_value_heads=4, vocab_size=32000).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def plan(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["plan", *arguments])
    return status, capsys.readouterr().out


def plan_json(capsys, *arguments: str) -> tuple[int, dict]:
    status, out = plan(capsys, *arguments, "--json")
    return status, json.loads(out)


def test_the_longest_that_fits_of_each_way(model, capsys):
    status, out = plan(capsys, model, "--gpu-memory", "12", "--gpus", "4", "--engine", "zero3", "--lora")
    assert status == 0
    for said in (
        "plain + checkpointing",
        "ds_minis, head_groups: auto, offload: cpu",
        "Advice: with",
        "counted",
        "slack",
        "each layer keeps everything up to",
        "the results of its matrix products up to",
        "the attention's output up to",
    ):
        assert said in out
    _, data = plan_json(capsys, model, "--gpu-memory", "12", "--gpus", "4", "--engine", "zero3", "--lora")
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["plain"]["longest"] < rows["plain + checkpointing"]["longest"] < rows["ds_minis"]["longest"]
    kept = data["kept_up_to"]
    assert 0 < kept["all"] < kept["matmuls"] < kept["attention"] < rows["ds_minis"]["longest"]
    assert rows[data["best"]]["longest"] == max(row["longest"] for row in data["rows"])
    for row in data["rows"]:
        on_device = sum(term["bytes"] for term in row["terms"] if not term["on_host"])
        assert on_device == pytest.approx(row["device_bytes"])


def test_what_is_kept_leaves_a_tenth_of_the_card_free(model):
    plan = compare(AutoConfig.from_pretrained(model), Setup(train="lora"), model=model, gpu_memory=12)
    assert set(plan.kept) == {"all", "matmuls", "attention"} and plan.capacity == 12 * 2**30 * 0.985
    for level, tokens in plan.kept.items():
        setup = plan.setup.replace(settings={"keep": level})
        at, beyond = (plan.planner.estimate(setup, n).verdict(0.9 * plan.capacity) for n in (tokens, tokens + UNIT))
        assert at == FITS != beyond, level


def test_a_machine_has_at_most_8_gpus():
    plan = Plan("m", Setup(), None, 80, 80 * 2**30, None, host_memory=64)
    assert [plan.host_capacity(gpus) for gpus in (1, 4, 8, 64)] == [64, 16, 8, 8]


def test_three_statuses_for_a_length(model, capsys):
    _, data = plan_json(capsys, model, "--gpu-memory", "12", "--seq", "64K")
    smallest = min(row["device_bytes"] for row in data["rows"]) / 2**30 / 0.985
    slack = max(row["slack_bytes"] for row in data["rows"]) / 2**30
    for memory, status, verdict in (
        (smallest + 2 * slack, 0, "fits"),
        (smallest + 1e-3, 1, "uncertain"),
        (smallest * 0.9, 2, "does not fit"),
    ):
        found, data = plan_json(capsys, model, "--gpu-memory", f"{memory:.6f}", "--seq", "64K")
        assert (found, data["verdict"]) == (status, verdict)
    _, data = plan_json(capsys, model, "--gpu-memory", "4", "--seq", "4M", "--host-memory", "1")
    assert data["gpus_needed"] > 1 and f"they do on {data['gpus_needed']} with zero3" in data["advice"]


def test_offload_says_what_the_host_needs(model, capsys):
    _, out = plan(capsys, model, "--gpu-memory", "4", "--lora")
    assert "`offload: cpu`" in out and "each process then needs" in out
    _, data = plan_json(capsys, model, "--gpu-memory", "4", "--lora", "--host-memory", "1")
    assert max(row.get("host_bytes", 0) for row in data["rows"] if row["verdict"] == "fits") <= 2**30


def test_settings_of_the_user_hold_in_all_rows(model, capsys):
    _, data = plan_json(capsys, model, "--gpu-memory", "8", "--set", "chunk_size=512", "--set", "keep=attention")
    ours = [row for row in data["rows"] if row["settings"] is not None]
    assert ours and all(row["settings"]["chunk_size"] == 512 and row["settings"]["keep"] == "attention" for row in ours)
    assert not any("head_groups" in row["settings"] for row in ours)


@pytest.mark.parametrize(
    ("setting", "rows"),
    [("keep=attention", ["", "offload"]), ("keep=matmuls", [""]), ("keep=all", [""])],
)
def test_rows_whose_settings_do_not_go_with_the_users_are_left_out(setting, rows, model, capsys):
    status, data = plan_json(capsys, model, "--gpu-memory", "12", "--gpus", "4", "--engine", "zero3", "--set", setting)
    ours = [row["settings"] for row in data["rows"] if row["settings"] is not None]
    assert status == 0 and all("keep" in settings for settings in ours)
    names = [
        "".join(name for name in ("head_groups", "offload") if name in s) for s in ours if "sequence_parallel" not in s
    ]
    assert names == rows
    assert any("sequence_parallel" in settings for settings in ours) == (setting != "keep=all")


def test_a_tensor_of_more_than_2_to_the_31_elements_is_named(model, capsys):
    _, out = plan(capsys, model, "--gpu-memory", "80", "--seq", "128K")
    assert "lm_head has 4,194,304,000 elements at 131,072 tokens, more than 2^31" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "none"], "a whole number from 1"),
        (["--seq", "long"], "such as 131072, 128K"),
        (["--engine", "zero9"], "one of single"),
        (["--set", "scope=everything"], "scope"),
        (["--set", "chunksize=3"], "chunk_size"),
        (["--from", "nowhere.yaml"], "no such file"),
        (["--lora", "--qlora"], "not allowed"),
        (["--gpu-memry", "8"], 'no such argument: --gpu-memry 8; did you mean "--gpu-memory"?'),
        (["--plot", "memory.xyz"], "a name that ends in .png"),
        (["--gpus", "-2"], "a whole number from 1"),
        (["--gpu-memory", "much"], "a number of gigabytes above 0"),
        (["--gpu-memory", "80000"], "at most 16,384"),
        (["--seq", "1.0001K"], "such as 131072, 128K or 1.5M"),
        (["--engine", "fsdp"], 'did you mean "fsdp2"'),
        (["--dtype", "bf16"], 'did you mean "bfloat16"'),
        (["--set", "head_groups=3"], "did you mean 2"),
        (["--gpus", "3", "--set", "sequence_parallel=2"], "--set sequence_parallel: 2 ranks"),
        (["--offload-optimizer"], "zero1, zero2, zero3"),
        (["--gpus", "2", "--engine", "zero2", "--offload-param"], "zero3, fsdp2"),
    ],
)
def test_wrong_arguments_end_with_64_and_one_line(model, arguments, said, capsys):
    try:
        status = main(["plan", model, *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_model_that_is_not_there(capsys):
    assert main(["plan", "./no-such-folder"]) == 64
    assert "no such file" in capsys.readouterr().err


def test_units(model, capsys):
    parser = make_parser()
    for memory, gigabytes in (("80", 80), ("80GB", 80), ("81920MiB", 80), ("0.5 TB", 512)):
        assert parser.parse_args(["plan", model, "--gpu-memory", memory]).gpu_memory == gigabytes
    for length, tokens in (("1.5M", 3 * 2**19), ("64k", 65536), ("100,000", 100_000)):
        assert parser.parse_args(["plan", model, "--seq", length]).seq == tokens


def test_verdict_and_longest_agree_between_and_below_whole_units(model, capsys):
    _, data = plan_json(capsys, model, "--gpu-memory", "8", "--lora")
    longest = {row["name"]: row["longest"] for row in data["rows"]}
    for seq in (700, longest["ds_minis"] + 1):
        _, data = plan_json(capsys, model, "--gpu-memory", "8", "--lora", "--seq", str(seq))
        assert any(row["verdict"] == "fits" for row in data["rows"])
        assert all((row["verdict"] == "fits") == (row["longest"] >= seq) for row in data["rows"])


def test_what_fits_within_the_slack_alone_is_said_so_without_a_length_too(model, capsys):
    _, data = plan_json(capsys, model, "--gpu-memory", "80", "--seq", "1K")
    least = min(row["device_bytes"] for row in data["rows"]) / 2**30 / 0.985
    status, data = plan_json(capsys, model, "--gpu-memory", f"{least + 1e-3:.6f}")
    assert (status, data["verdict"]) == (1, "uncertain")
    assert "1,024 tokens may fit (within the listed slack)" in data["advice"]


def test_more_gpus_share_a_machines_memory(model, capsys):
    arguments = "--gpu-memory", "2", "--host-memory", "8", "--set", "offload=cpu", "--lora"
    _, alone = plan_json(capsys, model, *arguments, "--seq", "4M")
    _, four = plan_json(capsys, model, *arguments, "--gpus", "4", "--engine", "ddp")
    assert all(row["host_bytes"] <= 2 * 2**30 for row in four["rows"] if row.get("longest"))
    assert alone["gpus_needed"] is None or alone["gpus_needed"] > 8  # each has 1 GiB of the machine's 8 then


def stated(path):
    return ConfigurationFile.read(path).fields


def test_reads_accelerates_and_deepspeeds_files(tmp_path):
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8}}
    zero |= {"gradient_accumulation_steps": 4, "mini_sequence": {"offload": "cpu"}}
    zero |= {"train_micro_batch_size_per_gpu": 3}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    expected = {"engine": "zero2", "offload_optimizer": True, "bucket": 500000000, "accumulation": 4, "batch": 3}
    expected |= {"settings": {"offload": "cpu"}}
    assert stated(tmp_path / "zero.json") == expected
    content = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 8,
        "deepspeed_config": {"deepspeed_config_file": "zero.json"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    assert stated(tmp_path / "a.yaml") == {**expected, "gpus": 8}
    fsdp = {
        "distributed_type": "FSDP",
        "num_processes": 2,
        "fsdp_config": {"fsdp_offload_params": True},
        "mini_sequence": True,
    }
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(fsdp))
    assert stated(tmp_path / "f.yaml") == {
        "engine": "fsdp2",
        "gpus": 2,
        "offload_param": True,
        "settings": {},
    }
    for text, said in (
        ("a: [", "no YAML"),
        ("- 1", "a mapping"),
        ("x: 1", "is allowed"),
        ("distributed_type: TPU", "TPU"),
        ("{distributed_type: FSDP, fsdp_config: {fsdp_reshard_after_forward: false}}", "reshard_after_forward"),
        ("{distributed_type: FSDP, fsdp_config: {fsdp_auto_wrap_policy: NO_WRAP}}", "TRANSFORMER_BASED_WRAP"),
    ):
        (tmp_path / "w.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            stated(tmp_path / "w.yaml")


def test_writes_what_it_advises_and_reads_it_back(model, capsys, tmp_path):
    source = tmp_path / "own.yaml"
    source.write_text(yaml.safe_dump({"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "bf16"}))
    for arguments, engine in ((["--from", str(source)], "fsdp2"), (["--gpus", "2"], "zero3")):
        folder = tmp_path / engine
        plan(capsys, model, "--gpu-memory", "8", "--lora", *arguments, "--write", str(folder))
        _, data = plan_json(capsys, model, "--gpu-memory", "8", "--lora", *arguments)
        best = next(row for row in data["rows"] if row["name"] == data["best"])
        found = stated(folder / "accelerate.yaml")
        assert (found["engine"], found["gpus"], found["settings"]) == (engine, 2, best["settings"])
    assert yaml.safe_load((tmp_path / "fsdp2" / "accelerate.yaml").read_text())["mixed_precision"] == "bf16"


FILES = {
    "fsdp.yaml": "{distributed_type: FSDP, num_processes: 2, fsdp_config: {fsdp_version: 2, fsdp_state_dict_type: X}}",
    "nested.yaml": "{distributed_type: DEEPSPEED, mixed_precision: bf16, deepspeed_config: {zero_stage: 2, "
    "gradient_clipping: 0.5, gradient_accumulation_steps: 2, offload_optimizer_device: cpu}}",
    "ddp.yaml": "{distributed_type: MULTI_GPU, num_processes: 2, mini_sequence: {chunk_size: 512}}",
    "zero3.json": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}, "gradient_clipping": 1.0, '
    '"train_micro_batch_size_per_gpu": 2, "train_batch_size": 16, "mini_sequence": true}',
}
OTHERWISE = [], ["--gpus", "4"], ["--engine", "zero3", "--gpus", "4"], ["--engine", "fsdp2", "--offload-param"]
OTHERWISE += (["--engine", "zero1", "--offload-optimizer"],)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("arguments", OTHERWISE, ids=" ".join)
def test_what_is_written_says_what_was_planned(model, name, arguments, capsys, tmp_path, monkeypatch):
    """Whatever the file said that a plan began with: an argument goes before it."""
    (tmp_path / name).write_text(FILES[name])
    given = [model, "--gpu-memory", "8", "--lora", "--from", str(tmp_path / name), *arguments]
    made = []
    monkeypatch.setattr(
        files, "write_configuration", lambda plan, *_: made.append(plan) or write_configuration(plan, *_)
    )
    plan(capsys, *given, "--write", str(tmp_path / "out"))
    setup, path = made[0].best.candidate.setup, tmp_path / "out" / "accelerate.yaml"
    found = Setup(train="lora", **stated(path))
    fields = ["engine", "gpus", "settings", "offload_optimizer", "offload_param"]
    fields += ["accumulation", "batch"] if setup.engine.startswith("zero") else []  # else they are the script's
    assert [getattr(found, field) for field in fields] == [getattr(setup, field) for field in fields]
    content = yaml.safe_load(path.read_text())
    if content["distributed_type"] == "DEEPSPEED":
        assert "mixed_precision" not in content and content["deepspeed_config"].keys() <= {
            "deepspeed_config_file",
            "zero3_init_flag",
        }
        json_content = json.loads((tmp_path / "out" / "deepspeed.json").read_text())
        if name == "nested.yaml":
            assert json_content["gradient_clipping"] == 0.5 and json_content["bf16"] == {"enabled": True}
    else:
        assert "deepspeed_config" not in content and ("fsdp_config" in content) == (setup.engine == "fsdp2")


def test_what_a_file_does_not_say_is_said(model, capsys, tmp_path):
    (tmp_path / "f.yaml").write_text("{distributed_type: FSDP, mini_sequence: {sequence_parallel: 2}}")
    _, out = plan(capsys, model, "--gpu-memory", "8", "--lora", "--from", str(tmp_path / "f.yaml"))
    assert "fsdp2, 2 x 8 GB" in out  # as many as share a sequence
    assert "names no number of processes: planned for 2" in out and "planned as FSDP2" in out


def test_what_a_deepspeed_json_beside_its_yaml_says_is_kept(model, capsys, tmp_path):
    zero = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.25}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    named = {"deepspeed_config_file": "zero.json"}  # beside the YAML, not in the folder that the command runs in
    source = tmp_path / "own.yaml"
    content = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": named}
    source.write_text(yaml.safe_dump(content))
    folder = tmp_path / "advised"
    plan(capsys, model, "--gpu-memory", "8", "--lora", "--from", str(source), "--write", str(folder))
    assert json.loads((folder / "deepspeed.json").read_text())["gradient_clipping"] == 0.25


def test_a_file_and_the_json_that_it_names_are_read_once(model, capsys, tmp_path, monkeypatch):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    named = "deepspeed_config: {deepspeed_config_file: zero.json}"
    (tmp_path / "own.yaml").write_text(f"{{distributed_type: DEEPSPEED, num_processes: 2, {named}}}")
    load, reads = files.load_mapping, []
    monkeypatch.setattr(files, "load_mapping", lambda path: reads.append(Path(path).name) or load(path))
    given = ["--gpu-memory", "8", "--lora", "--from", str(tmp_path / "own.yaml"), "--write", str(tmp_path / "out")]
    assert plan(capsys, model, *given)[0] == 0 and (tmp_path / "out" / "deepspeed.json").exists()
    assert reads == ["own.yaml", "zero.json"]


def test_the_picture_has_titles_units_and_the_card(model, capsys, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", shown.append)
        plan(capsys, model, "--gpu-memory", "8", "--plot", str(tmp_path / "p.png"))
    (figure,) = shown
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "memory of a training step" in figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_xlabel().endswith("(1 K = 1,024)") and axes.get_title()
    assert figure.axes[0].get_ylabel() == "memory of one GPU, GiB"
    assert any("the card" in text.get_text() for text in figure.legends[0].get_texts())


def test_traces_are_kept(model, capsys, monkeypatch):
    plan(capsys, model, "--gpu-memory", "8")
    monkeypatch.setattr("ds_minis.planner.plan.planner.trace", None)
    assert plan(capsys, model, "--gpu-memory", "9")[0] == 0


def test_the_command_imports_nothing_heavy():
    code = (
        "import sys, ds_minis.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_known_models_by_their_short_names():
    assert known_name("Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B"
    assert known_name("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
    assert known_name("somebody/Qwen3-8B") is None
    assert len({name.lower() for name in MODELS}) == len(MODELS)
