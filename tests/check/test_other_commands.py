"""`ds-minis env`, `ds-minis config validate` and `ds-minis bench`: what they print, and their exit status."""

import json

import pytest

from ds_minis.cli import bench, env, main


def test_env_says_what_one_pastes_into_an_issue(capsys):
    status = main(["env"])
    out = capsys.readouterr().out
    for said in (
        "ds_minis: ",
        "torch  ",
        "transformers  ",
        "cuda",
        "host memory",
        "zero0 to zero3",
        "attaches itself: ",
    ):
        assert said in out
    assert status == int("problem: " in out)


def test_env_as_json(capsys):
    main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] and isinstance(found["problems"], list)


def test_deepspeeds_short_timeout_is_a_hint(monkeypatch):
    monkeypatch.setattr(env, "version", lambda name: "1.0")
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert any("DEEPSPEED_TIMEOUT=60" in hint for hint in env.hints())
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "60")
    assert not list(env.hints())


def test_kernels_outside_of_transformers_window_is_a_problem():
    (problem,) = env.kernels_problem("0.1.0")
    assert "kernels 0.1.0" in problem and "pip install" in problem
    assert not list(env.kernels_problem(""))


@pytest.mark.parametrize(
    ("name", "text", "status", "said"),
    [
        ("a.yaml", "distributed_type: FSDP\nmini_sequence: {chunk_size: 512}\n", 0, "right: chunk_size: 512"),
        ("a.yaml", "distributed_type: FSDP\nmini_sequence: {chunk_sise: 512}\n", 1, "chunk_size"),
        ("a.yaml", "distributed_type: FSDP\nmini_sequence: {scope: layers}\n", 1, "layer"),
        ("a.yaml", "distributed_type: FSDP\nmini_sequences: true\n", 1, "did you mean"),
        ("a.yaml", "distributed_type: MULTI_CPU\nmini_sequence: true\n", 0, "starts one process"),
        ("a.yaml", "distributed_type: NO\n", 0, "asks for nothing"),
        ("a.yaml", "a: [\n", 1, "no YAML"),
        ("z.json", '{"zero_optimization": {"stage": 3}, "mini_sequence": {"offload": "cpu"}}', 0, 'offload: "cpu"'),
        ("z.json", '{"zero_optimization": {"stage": 3, "mini_sequence": true}}', 1, "top level"),
        ("z.json", "{", 1, "no JSON"),
        ("s.json", '{"head_groups": "auto"}', 0, 'head_groups: "auto"'),
    ],
)
def test_files_are_validated(name, text, status, said, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["config", "validate", str(tmp_path / name)]) == status
    out = capsys.readouterr().out
    assert said in out and ("wrong: " in out) == bool(status)
    main(["config", "validate", str(tmp_path / name), "--json"])
    assert json.loads(capsys.readouterr().out)["valid"] == (status == 0)


def test_a_yaml_and_the_json_that_it_names_must_agree(tmp_path, capsys):
    (tmp_path / "z.json").write_text('{"zero_optimization": {"stage": 2}, "mini_sequence": {"chunk_size": 512}}')
    text = "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: z.json}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert main(["config", "validate", str(tmp_path / "a.yaml")]) == 0
    assert "chunk_size: 512" in capsys.readouterr().out
    (tmp_path / "a.yaml").write_text(text + "mini_sequence: {chunk_size: 256}\n")
    assert main(["config", "validate", str(tmp_path / "a.yaml")]) == 1
    assert "two places ask for different" in capsys.readouterr().out


def test_benchmarks_are_listed_and_run(capsys):
    assert main(["bench"]) == 0
    assert all(name in capsys.readouterr().out for name in bench.NAMES[:1])
    assert all((bench.FOLDER / f"{name}.py").is_file() for name in bench.NAMES)
    assert main(["bench", "nothing"]) == 64
    assert "max_context" in capsys.readouterr().err
    assert main(["bench", "report", "--help"]) == 0


def test_benchmarks_need_the_repository(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "nowhere")
    assert main(["bench"]) == 64
    assert "clone it" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan"], ["check"], ["env"], ["config", "validate"], ["bench"]])
def test_each_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "ds-minis " + " ".join(command) in out
