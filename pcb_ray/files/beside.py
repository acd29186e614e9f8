"""Which files of a model's folder go along into an output beside its tensors: all, but for those that are named here.

The list says what is left out and why, and is the same for folders and for the Hub: what nobody here has heard of (code, pooling,
a processor's settings, a licence) is needed by somebody's loader.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.files.foreign import is_plain_text, mismatch

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

MAX_FILE_BYTES = 256 << 20
"""Tokenizers take up to 60 MB. What is larger is data that lies there by chance."""
MAX_FILES = 10_000

# --- what belongs to a tokenizer, and is taken from where the tokenizer is --------------------------------------------------------

TOKENIZER = (
    "tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab*", "*_vocab.json", "merges*.txt",
    "*.model", "*.spm", "*.tiktoken", "*.bpe", "bpe.codes", "dict.txt", "tekken.json", "encoder.json", "normalizer.json",
    "chat_template*.json", "chat_template*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip

# --- what is left out: (why, patterns of folders, patterns of files) --------------------------------------------------------------

_TRAINING = (
    "training state",
    ("checkpoint-*", "global_step*", "runs", "wandb", "logs", "mlruns", "lightning_logs", "tensorboard", "pytorch_model_fsdp*",
     "optimizer_*"),
    ("optimizer*.pt", "optimizer*.bin", "optimizer*.safetensors", "scheduler*.pt", "scheduler*.bin", "scaler*.pt", "rng_state*",
     "random_states*", "training_args.*", "trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json",
     "eval_results.json", "predict_results.json", "events.out.tfevents.*", "zero_to_fp32.py", "latest", "*.distcp",
     "zero_pp_rank_*", "bf16_zero_pp_rank_*", "*_optim_states.pt", "*_model_states.pt", "dcp_metadata*"),
)  # fmt: skip
_FOREIGN = (
    "another framework's weights",
    ("onnx", "openvino", "coreml", "tflite", "*.mlpackage", "*.mlmodelc"),
    ("*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.onnx.data", "*.gguf", "*.ggml", "*.tflite", "*.mlmodel", "*.ot", "*.pb",
     "*.nemo", "*.pdparams", "*.engine", "*.llamafile", "ggml-*.bin", "openvino_*", "flax_model*", "tf_model*"),
)  # fmt: skip
_ADAPTER = ("an adapter, which is not merged", (), ("adapter_config.json", "adapter_model.*"))
_QUANTISATION = (
    "settings of quantised weights, which the output has not", (),
    ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json", "quant_strategy.json"),
)  # fmt: skip
_LEFT_OUT = (
    ("a cache", ("__pycache__",), ("*.pyc", "*.incomplete")),
    ("the original of another layout", ("original",), ()),
    _TRAINING,
    _FOREIGN,
    _ADAPTER,
    _QUANTISATION,
)
# At the top of the folder: what tells of the base, and would be untrue of the output.
_OF_THE_BASE = {"README.md": "the base's own card"} | dict.fromkeys(
    ("pcb_receipt.json", "pcb_recipe.yaml", "best_recipe.yaml", "mergekit_config.yml", "mergekit_config.yaml"),
    "a record of how the base was made",
)
OTHER_WEIGHTS = "weights that are not merged"
# In a subfolder these are what a loader looks for; at the top, where the model's own lie, all with these suffixes are weights.
_WEIGHTS = (
    *(f"{stem}*{suffix}" for stem in ("model", "pytorch_model", "diffusion_pytorch_model", "consolidated", "open_clip_")
      for suffix in (".safetensors", ".bin", ".pt", ".pth")),
    "*.safetensors.index*.json", "*.bin.index*.json",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
LEADS_OUT, LEADS_NOWHERE = "a link that leads out of the model's folder", "a link that leads nowhere"


@dataclass(frozen=True, slots=True)
class Beside:
    """A file of a model that holds none of its tensors, or (with a `/` at its end) a folder of such files, all left out."""

    name: str
    """Its path within the model."""
    size: int
    """In bytes."""
    left_out: str = ""
    """Why it stays behind; empty for what goes along."""
    is_surprising: bool = False
    """Whether somebody may miss it: such a file is told of before the run, the others in the plan alone."""
    is_needed: bool = False
    """Whether the model's loader reads it, so that an output without it could not be loaded."""


def is_of_tokenizer(name: str) -> bool:
    """Whether a file is taken from where the tokenizer is."""
    return name == GENERATION_CONFIG or has_tokenizer(name)


def has_tokenizer(name: str) -> bool:
    """Whether a file tells of a tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in TOKENIZER if pattern.count("/") == name.count("/"))


def beside(sizes: Mapping[str, int], weights: Collection[str], parts: Collection[str] = ()) -> tuple[Beside, ...]:
    """What lies beside the `weights` (the model's own files of tensors, and their index) among these files, in order of names. The
    folders `parts` are other parts of the model, by the word of its loader: they go along with their weights."""
    names = sorted(name for name in sizes if name not in weights)
    other_models = {name.rpartition("/")[0] for name in names if "/" in name and _is_weights(name) and not _is_part(name, parts)}
    found: dict[str, Beside] = {}
    for name in names:
        one = _folder_left_out(name, other_models - {""}) or _file(name, sizes[name], parts)
        before = found[one.name].size if one.name in found else 0
        found[one.name] = replace(one, size=before + sizes[name])
    return tuple(found.values())


def _folder_left_out(name: str, other_models: Collection[str]) -> Beside | None:
    """The outermost folder on the way to a file that is left out as a whole."""
    folders = name.split("/")[:-1]
    for depth, folder in enumerate(folders):
        path = "/".join(folders[: depth + 1])
        why = "hidden" if folder.startswith(".") else _matching(folder, 1)
        if why:
            return Beside(f"{path}/", 0, why)
        if path in other_models:
            return Beside(f"{path}/", 0, OTHER_WEIGHTS, is_surprising=True)
    return None


def _file(name: str, size: int, parts: Collection[str]) -> Beside:
    *folders, file = name.split("/")
    if not is_plain_text(name) or "\\" in name:
        return Beside(name, 0, "a name that is not plain text", is_surprising=True)
    if file.startswith("."):
        return Beside(name, 0, "hidden")
    if why := _matching(file, 2) or _OF_THE_BASE.get(name, ""):
        return Beside(name, 0, why)
    if _is_part(name, parts):
        return Beside(name, 0)
    if not folders and (_is_weights(name) or file.lower().endswith(WEIGHT_SUFFIXES)):
        return Beside(name, 0, OTHER_WEIGHTS, is_surprising=not _is_weights(name))
    if size > MAX_FILE_BYTES:
        return Beside(name, 0, f"larger than {MAX_FILE_BYTES:,} bytes", is_surprising=True)
    return Beside(name, 0)


def _is_weights(name: str) -> bool:
    file = name.rpartition("/")[2]
    return any(fnmatchcase(file, pattern) for pattern in _WEIGHTS)


def _matching(name: str, which: int) -> str:
    return next((row[0] for row in _LEFT_OUT if any(fnmatchcase(name, pattern) for pattern in row[which])), "")


def _is_part(name: str, parts: Collection[str]) -> bool:
    return any(name.startswith(f"{part}/") for part in parts)


# --- a folder's files -------------------------------------------------------------------------------------------------------------


def sizes_in(folder: Path) -> tuple[dict[str, int], tuple[Beside, ...]]:
    """The regular files of a folder and below it with their sizes, by their paths in it; folders that are left out as a whole are
    one name with a `/` at its end. Apart from them those that can't be taken: links which lead elsewhere (but to the Hub's cache,
    where every file is such a link), and folders that can't be read. Raises RequestError."""
    home = folder.resolve()
    sizes: dict[str, int] = {}
    not_taken: list[Beside] = []
    for count, (name, entry) in enumerate(_walk(home, folder, "", not_taken)):
        if count == MAX_FILES:
            found = f"more than {MAX_FILES:,} files in it"
            raise RequestError(f"{folder}: {mismatch('the folder of one model', found, 'give the model a folder of its own')}")
        try:
            target = Path(entry.path).resolve() if entry.is_symlink() else None
            status = entry.stat()
        except (OSError, RuntimeError):  # a link to nothing, or to itself
            not_taken.append(Beside(name, 0, LEADS_NOWHERE, True))
            continue
        if target is not None and not target.is_relative_to(home) and not _in_hub_cache(target):
            not_taken.append(Beside(name, status.st_size, LEADS_OUT, True))
        elif name.endswith("/"):
            sizes[name] = 0
        elif stat.S_ISREG(status.st_mode):
            sizes[name] = status.st_size
    return sizes, tuple(not_taken)


def _walk(home: Path, folder: Path | str, prefix: str, not_taken: list[Beside]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All but folders, in no order; of folders that are left out as a whole only their names. A link to a folder of the model is
    one of its folders, and one to a folder elsewhere counts as a file."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False) and not _is_own_folder(Path(entry.path), home):
                    yield f"{prefix}{entry.name}", entry
                elif entry.name.startswith(".") or _matching(entry.name, 1):
                    yield f"{prefix}{entry.name}/", entry
                else:
                    yield from _walk(home, entry.path, f"{prefix}{entry.name}/", not_taken)
    except OSError as error:
        not_taken.append(Beside(prefix or "./", 0, f"a folder that can't be read: {error.strerror}", True))


def _is_own_folder(link: Path, home: Path) -> bool:
    """Whether a link leads to a folder of the model that it does not lie in itself."""
    try:
        target = link.resolve()
        return target.is_dir() and target.is_relative_to(home) and not link.parent.resolve().is_relative_to(target)
    except (OSError, RuntimeError):  # a link to itself, of which `sizes_in` tells
        return False


def _in_hub_cache(target: Path) -> bool:
    """Whether a file is a blob of the Hub's cache: `models--org--name/blobs/<digest>`."""
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
