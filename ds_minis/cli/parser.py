"""argparse, with errors of one line that name the nearest flag or command. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ds_minis.config_values import nearest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    Attributes:
        wrong: exit status of a wrong argument.
    """

    wrong = 2

    def error(self, message: str) -> NoReturn:
        self.exit(self.wrong, f"{self.prog}: {message} ({self.prog} --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Arguments that nobody knows are an error of the command that they were given to."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._of_command(parsed).error(f"no such argument: {' '.join(unknown)}{self._near(parsed, unknown[0])}")
        return parsed

    def _of_command(self, parsed: argparse.Namespace) -> Parser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices[getattr(parsed, action.dest)]._of_command(parsed)
        return self

    def _near(self, parsed: argparse.Namespace, word: str) -> str:
        flags = self._of_command(parsed)._option_string_actions
        return nearest(word.partition("=")[0], flags) if word.startswith("-") else ""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            near = nearest(value, allowed)
            raise argparse.ArgumentError(action, f"one of {', '.join(allowed)} is allowed, got {value!r}{near}")
