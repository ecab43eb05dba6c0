"""Heat-maps, panels, animations: what they say, and what is in them."""

import sys

import pytest

from ds_minis.context.needle import plot as needle_plot
from ds_minis.context.needle.plot import plot_animation, plot_heat_map, plot_panels

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'ds_minis[plots]'")
Image = pytest.importorskip("PIL.Image", reason="pictures need pillow: pip install 'ds_minis[plots]'")


def results(right=(2, 2, 0, 1), lengths=(64, 2048), model="a/b/tiny"):
    cells = [
        {"length": length, "depth": depth, "right": right[2 * i + j], "total": 2}
        for i, length in enumerate(lengths) for j, depth in enumerate((0.0, 1.0))
    ]  # fmt: skip
    return {"model": model, "task": {"variant": "niah_single"}, "rope_theta": 96918.9, "cells": cells}


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that was saved."""
    figures, save = [], needle_plot.save

    def keep(figure, where, **options):
        figures.append(figure)
        save(figure, where, **options)

    monkeypatch.setattr(needle_plot, "save", keep)
    return figures


def test_a_heat_map_says_what_of_and_in_which_units(drawn, tmp_path):
    path = plot_heat_map(results(), tmp_path / "new" / "map.png")
    panel, bar = drawn[0].axes
    assert panel.get_title() == "tiny: niah_single, RoPE theta 96,919\n62.5% of 8 answers right"
    assert panel.get_xlabel() == "context length (tokens)" and bar.get_ylabel() == "answers right (%)"
    assert panel.get_ylabel() == "depth of the needle (% of the text)"
    assert [t.get_text() for t in panel.get_xticklabels()] == ["64", "2,048"]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["0", "100"]
    # Rows are depths, columns lengths, and each has its number.
    assert panel.images[0].get_array().tolist() == [[100, 0], [100, 50]]
    assert [text.get_text() for text in panel.texts] == ["100", "0", "100", "50"]
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_a_large_heat_map_has_no_numbers(drawn, tmp_path):
    cells = [{"length": n, "depth": d / 20, "right": 1, "total": 1} for n in range(100, 1600, 100) for d in range(21)]
    plot_heat_map(results() | {"cells": cells}, tmp_path / "map.png", "a title")
    assert not drawn[0].axes[0].texts and drawn[0].axes[0].get_title().startswith("a title\n100.0% of 315 answers")


def test_panels_have_titles_and_the_same_axes(drawn, tmp_path):
    plot_panels([results(), results((0, 0, 0, 0), (64, 512))], tmp_path / "two.png", ["one", "two"], "both")
    one, two, _ = drawn[0].axes
    assert [panel.get_title().splitlines()[0] for panel in (one, two)] == ["one", "two"]
    assert [t.get_text() for t in two.get_xticklabels()] == ["64", "512", "2,048"] and drawn[
        0
    ]._suptitle.get_text() == "both"
    assert [text.get_text() for text in two.texts] == ["0"] * 4  # nothing where nothing was tested


def test_an_animation_has_a_frame_for_each_checkpoint(drawn, tmp_path):
    frames = [[results((0, 0, 0, 0)), results()], [results(), results()], [results((2, 2, 2, 2)), results()]]
    path = plot_animation(frames, tmp_path / "map.gif", ["one", "two"], ["at the start", "in between", "at the end"])
    assert [figure._suptitle.get_text() for figure in drawn] == ["at the start", "in between", "at the end"]
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 3 and image.info["loop"] == 0
        seen = set()
        for i in range(3):
            image.seek(i)
            seen.add(image.convert("RGB").tobytes())
        assert len(seen) == 3


def test_without_matplotlib_what_to_install_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ds_minis\[plots\]'"):
        plot_heat_map(results(), tmp_path / "map.png")
