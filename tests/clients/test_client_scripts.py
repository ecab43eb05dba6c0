"""scripts/clients.py: what it compares, what it refuses to call equal, and that its page is what its results give."""

import json
import re

import clients
import pytest
import torch
from client_recipes import CLIENTS, STEPS, NoSource, source_file
from clients import CannotRun, Run, compared

LOSSES = [8.3, 8.2, 8.1]
START = {"w": torch.zeros(3)}
REPORT = "ds_minis (somewhere): all defaults\n  tiled as a whole: 2 x LlamaDecoderLayer\n  loss: tiled"
OFF = Run(LOSSES, {"w": torch.tensor([0.1, 0.2, -0.3])}, "")
CLIENT = CLIENTS[0]


def converted(losses=LOSSES, weights=OFF.weights, report=REPORT) -> Run:
    return Run(losses, weights, report)


def test_equal_trainings_are_exact():
    row = compared(CLIENT, converted([8.3, 8.2, 8.1 * (1 + 5e-6)]), OFF, START)
    assert row["exact"] and row["loss_difference"] == pytest.approx(5e-6, rel=1e-3) and row["weight_difference"] == 0


@pytest.mark.parametrize(
    "on",
    [converted([8.3, 8.2, 8.1 * (1 + 5e-5)]), converted(weights={"w": torch.tensor([0.1, 0.2, -0.3003])})],
    ids=["losses", "weights"],
)
def test_a_difference_is_not_exact(on):
    assert not compared(CLIENT, on, OFF, START)["exact"]


@pytest.mark.parametrize(
    ("on", "off", "start", "why"),
    [
        (converted(LOSSES[:2]), OFF, START, f"logged 2 and 3 losses in {STEPS} steps"),
        (converted(report=""), OFF, START, "converted nothing"),
        (converted(), Run(LOSSES, OFF.weights, REPORT), START, "or something with them off"),
        (converted(), OFF, OFF.weights, "trained nothing"),
        (converted(weights={"v": torch.ones(3)}), OFF, START, "saved other weights"),
    ],
    ids=["losses", "not converted", "always converted", "not trained", "other weights"],
)
def test_what_proves_nothing_is_no_row_of_equal_losses(on, off, start, why):
    with pytest.raises(CannotRun, match=why):
        compared(CLIENT, on, off, start)


def test_programs_are_pinned_and_nothing_in_them_turns_mini_sequences_on(tmp_path, monkeypatch):
    commits = []
    monkeypatch.setattr(
        "client_recipes.source_file",
        lambda folder, _, commit, path: commits.append(commit) or folder / "sources" / path,
    )
    names = [client.name for client in CLIENTS]
    assert len(set(names)) == len(names) and {"trl sft", "LLaMA-Factory sft", "ms-swift sft, full"} <= set(names)
    for client in CLIENTS:
        assert re.fullmatch(r"[\w-]+==[\d.]+", client.package)
        if "lora" not in client.name:  # whose recipe draws an adapter of a model
            assert "mini_sequence" not in " ".join(map(str, client.prepare(tmp_path)))
    assert commits and all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any("mini_sequence" in text or "ds_minis" in text for text in written)


def test_a_source_that_is_there_is_not_downloaded_and_one_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    def refused(address, timeout):
        raise OSError("no network")

    monkeypatch.setattr("client_recipes.urllib.request.urlopen", refused)
    with pytest.raises(
        NoSource, match="https://raw.githubusercontent.com/a/b/c0ffee/d/e.py could not be had: no network"
    ):
        source_file(tmp_path, "a/b", "c0ffee", "d/e.py")
    place = tmp_path / "sources" / "a" / "b" / "d" / "e.py"
    place.write_text("")
    assert source_file(tmp_path, "a/b", "c0ffee", "d/e.py") == place


def test_the_page_is_what_the_results_give_and_every_row_is_a_run():
    rows = json.loads(clients.RESULTS.read_text(encoding="utf-8"))
    assert clients.PAGE.read_text(encoding="utf-8") == clients.page(rows)
    assert [row["name"] for row in rows] == [client.name for client in CLIENTS]
    for row in rows:
        assert row.get("not_run") or (row["exact"] and len(row["losses"]) == STEPS and len(set(row["losses"])) == STEPS)
        assert row["date"] and row["machine"]


def test_of_several_models_the_one_that_was_trained_is_shown():
    reference = "ds_minis (a): {}\n  tiled: 1 x Norm\n  loss: not called"
    trained = "ds_minis (a): {}\n  tiled: 2 x Norm\n  loss: tiled\n  the last step: 9 tokens in 3 chunks of at most 4"
    for text in (f"{trained}\n{reference}", f"{reference}\n{trained}"):
        assert clients.trained_report(text)[0] == "  tiled: 2 x Norm" and len(clients.trained_report(text)) == 3
    assert clients.trained_report(reference) == ["  tiled: 1 x Norm", "  loss: not called"]
