"""The plots say what they show without the text, show all models of their file, and stand where they are discussed."""

import json
import subprocess
import sys

import plots
import pytest
import report

FILES = report.read(report.RESULTS)
PICTURES = plots.pictures(FILES)


def test_every_plot_is_there_and_embedded_and_no_other():
    there = {path.stem for path in report.RESULTS.glob("*.png")}
    page = (report.RESULTS / "README.md").read_text(encoding="utf-8")
    figures = (report.RESULTS.parent / "docs" / "memory_and_speed.md").read_text(encoding="utf-8")
    assert there == PICTURES.keys() == {name for name in there if f"]({name}.png)" in page}
    assert all(f"](../benchmarks/{name}.png)" in figures for name in ("transient_memory", "max_context_simulated"))


@pytest.mark.parametrize("name", PICTURES)
def test_titles_are_in_words_and_axes_have_units(name):
    picture = PICTURES[name]
    shown = [picture.title, *[panel.title for panel in picture.panels]]
    shown += [plots.in_words(bar) for panel in picture.panels for bar in panel.bars]
    assert not any(word in text for text in shown for word in ("W of", "llama-3-8b", "scope", "TiledMLP", "lora:"))
    assert ("simulated" in picture.title) == FILES[f"{name}.json"]["simulated"]
    units = ("KiB", "MiB", "tokens", "ms", "time of a step")
    assert all("is better" in p.unit and p.unit.startswith(("KiB", "MiB", "K tokens", *units)) for p in picture.panels)


def test_all_models_of_a_file_are_shown_and_nothing_alone():
    models = FILES["transient_memory_models.json"]["results"]
    assert [panel.title for panel in PICTURES["transient_memory_models"].panels] == [plots.MODELS[m] for m in models]
    assert all(len(panel.bars) > 1 for picture in PICTURES.values() for panel in picture.panels)
    assert "max_context_offload_simulated" not in PICTURES  # one bar


def test_a_family_has_one_colour_and_no_two_the_same():
    colours = [colour for _, colour in plots.FAMILIES.values()]
    assert len(set(colours)) == len(colours)
    bars = [bar for picture in PICTURES.values() for panel in picture.panels for bar in panel.bars]
    assert {plots.family(bar)[1] for bar in bars if bar.startswith("ds_minis")} == {plots.FAMILIES["ds_minis"][1]}
    assert plots.family("plain checkpointing (transformers)") == plots.FAMILIES[""]


def test_no_two_bars_of_a_panel_have_one_name():
    for picture in PICTURES.values():
        for panel in picture.panels:
            assert len({plots.in_words(bar) for bar in panel.bars}) == len(panel.bars)


def test_rows_of_peak_memory_come_one_by_one():
    small = ["--tokens", "256", "--hidden_size", "32", "--layers", "1", "--vocab_size", "128"]
    command = [sys.executable, "scripts/bench/peak_memory.py", *small, "--json", "/dev/null"]
    run = subprocess.Popen(
        command, cwd=report.RESULTS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("plain checkpointing"):
            assert run.poll() is None  # the others are still to come
    assert run.wait() == 0 and [line[:10] for line in lines[2:]] == [
        "plain chec",
        "MLP tiled ",
        "MLP and lo",
        "everything",
    ]
    assert json.dumps(lines).count("ds_minis (") == 0  # no report between the rows
    assert "Warning" not in run.stderr.read()
