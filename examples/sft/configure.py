"""Copies of a run script's configurations with one more setting of mini-sequences.

python configure.py FOLDER KEY=VALUE ACCELERATE_YAML [DEEPSPEED_JSON]

writes files of the same names to FOLDER. The setting goes to the `mini_sequence` section of the JSON if there is one, else of
the YAML; a section of `true`, or none, is all defaults. VALUE is JSON, such as 2 or {"size": 2, "mode": "ring"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SECTION = "mini_sequence"


def with_setting(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with a setting in its `mini_sequence` section.

    Raises:
        SystemExit: the section turns mini-sequences off.
    """
    section = config.get(SECTION)
    if section is False:
        sys.exit(f"configure.py: {key}={value}: mini_sequence is false in the configuration; set it to true")
    return config | {SECTION: (section if isinstance(section, dict) else {}) | {key: value}}


def main(folder: Path, setting: str, *files: str) -> None:
    """Writes the copies."""
    key, _, text = setting.partition("=")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        sys.exit(f"configure.py: {setting}: a JSON value is allowed, such as 2")
    paths = [Path(file) for file in files if file]
    for path in paths:
        is_json = path.suffix == ".json"
        config = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
        if path is paths[-1]:
            config = with_setting(config, key, value)
        elif "deepspeed_config" in config:  # its own reference to the JSON is replaced by the launch line's
            config["deepspeed_config"] |= {"deepspeed_config_file": str(folder / paths[-1].name)}
        text = json.dumps(config, indent=2) + "\n" if is_json else yaml.safe_dump(config, sort_keys=False)
        (folder / path.name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
