"""Files that are there whole or not at all: written beside, flushed to the disk, renamed into place."""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path):
    """Gives the path of a new file beside `path` and renames it into place at the end: readers, and a machine after a
    power cut, see the old file or the new one, never half of one."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    try:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        if os.name == "posix":  # safetensors writes for the owner alone
            os.umask(mask := os.umask(0))
            with suppress(OSError):  # a Windows disk under WSL has no such bits
                os.chmod(beside, 0o666 & ~mask)
        rename(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def rename(old, new):
    """Renames a file or folder, and waits until the disk knows of it: without that a power cut can undo it."""
    os.replace(old, new)
    with suppress(OSError):  # Windows opens no folders
        folder = os.open(Path(new).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        adapter = Path(path).with_name("adapter_config.json").exists()
        right = "the folder holds a LoRA adapter: merge it into its base" if adapter else "a checkpoint folder holds it"
        raise FileNotFoundError(f"{path} does not exist ({right})") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error} (a JSON file)") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
