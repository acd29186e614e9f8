"""A merged model takes files beside the tensors from its inputs: this is one list, for what is fetched and for what is copied.

They are config, processor and tokenizer files by name: never code, and never tensors in another format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

CONFIG = "config.json"
OF_BASE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OF_TOKENIZER = (
    "generation_config.json", "tokenizer*.json", "tokenizer*.txt", "special_tokens_map.json", "added_tokens.json", "vocab*.json",
    "vocab*.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*.json", "chat_template*.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
COMPANIONS = (CONFIG, *OF_BASE, *OF_TOKENIZER)


def among(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return those of a model's files, by their paths in it, that the patterns mean, in order. A `*` stands for no `/`."""
    return sorted(name for name in names if any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns))


def in_folder(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return those files of a folder that the patterns mean, in order."""
    places = sorted({folder / PurePosixPath(pattern).parent for pattern in patterns})
    files = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()]
    return among((path.relative_to(folder).as_posix() for path in files), patterns)
