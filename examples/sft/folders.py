"""What can be known about the folders of a run before anything is loaded from them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PICKLED = "pytorch_model*.bin", "adapter_model.bin"


def require_input(flag: str, name: str) -> None:
    """Refuses a folder that does not exist, and weights that are pickled; a hub id is looked up by who loads it.

    The libraries take a path that does not exist for a hub id, and complain about its form or about the network.
    """
    folder = Path(name)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_like_a_path and not folder.exists():
        raise ValueError(
            f"{flag} {name}: there is no such folder (looked for {folder.absolute()}). Give a folder that exists, or a hub id"
        )
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{flag} {name}: its weights are pickled ({', '.join(pickled)}), and loading a pickle can run any code. Only "
            "safetensors are loaded: save the model anew with a current save_pretrained, or take a copy with *.safetensors"
        )


def require_output(flag: str, name: str) -> None:
    """Refuses a folder that cannot be written to, before hours of training whose result could not be saved."""
    try:
        os.makedirs(name, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=name, prefix=".writable-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise ValueError(
            f"{flag} {name}: cannot write there ({error.strerror}). Give a folder that this user may write to, on a disk "
            "with room"
        ) from error
