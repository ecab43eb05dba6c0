"""The command `ds-minis`: one file per subcommand."""

from ds_minis.cli.command import main

__all__ = ["main"]
