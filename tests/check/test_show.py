"""What commands print: tables by rich on a terminal, and elsewhere the text that pipes and files had before."""

import contextlib
import io
import sys

import pytest

from ds_minis.cli import config, env, main, show
from ds_minis.cli.show import Table, as_lines

PARTS = [
    "before [bold]",
    Table(["name", "GiB"], [["[red]", "1.5"], ["b", "20"]], ["plain 1", "plain 2"], "of it", numbers=1),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_a_pipe_gets_plain_text(capsys):
    show.show(PARTS)
    assert capsys.readouterr().out == "before [bold]\nplain 1\nplain 2\n" == as_lines(PARTS) + "\n"


def test_a_terminal_gets_tables_with_their_words_as_they_are(terminal):
    pytest.importorskip("rich")
    with contextlib.redirect_stdout(terminal):
        show.show(PARTS)
    printed = terminal.getvalue()
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    assert lines[:2] == ["before [bold]", "of it"] and "plain" not in printed and "─" in printed
    assert [line.split() for line in lines[-2:]] == [["[red]", "1.5"], ["b", "20"]]
    assert len(lines[-2]) == len(lines[-1])  # numbers end in one column


def test_without_rich_a_terminal_gets_plain_text(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with contextlib.redirect_stdout(terminal):
        show.show(PARTS)
    assert terminal.getvalue() == as_lines(PARTS) + "\n"


def test_nothing_is_said_of_work_where_there_is_no_terminal(capsys):
    with show.working("at work"):
        pass
    assert capsys.readouterr() == ("", "")


def test_commands_answers_are_the_same_on_both(tmp_path, monkeypatch):
    """Every cell of a table is in the plain text, in the order of its rows."""
    (tmp_path / "s.yaml").write_text("{chunk_size: 512, offload: cpu}")
    shown = []
    monkeypatch.setattr(config, "show", shown.extend)
    monkeypatch.setattr(env, "show", shown.extend)
    for command in (["config", "validate", str(tmp_path / "s.yaml")], ["env"]):
        main(command)
    tables = [part for part in shown if isinstance(part, Table)]
    assert len(tables) == 4
    for table in tables:
        plain = "\n".join(table.plain)
        assert all(cell in plain for row in table.rows for cell in row)
