"""Whether a model is quantised is told by its tensors: a config may be left over from a training, or say nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pcb_ray.files.foreign import mismatch, show
from pcb_ray.files.safetensors import FLOAT_DTYPES, Tensor

CONFIG_KEYS = ("quantization_config", "compression_config")
"""What a config says of it; an output has none of these."""

ANOTHER_FORM = "give the model that it was made from, in bfloat16, float16 or float32"
_LOADED = (
    "load it with transformers and quantization_config={}(dequantize=True), call save_pretrained(FOLDER, "
    "save_original_format=False), and give that folder"
)


class _Scheme(NamedTuple):
    name: str
    of_config: tuple[str, ...]
    """Its `quant_method` in a config."""
    patterns: tuple[str, ...]
    """Names of tensors: a model that has some of each, and integers among them or for weights, is quantised so."""
    fix: str = ANOTHER_FORM


_BNB = "load it with transformers and bitsandbytes, call its dequantize(), save_pretrained, and give that folder"
_SCHEMES = (
    _Scheme("bitsandbytes (4 bit)", (), ("*.quant_state.bitsandbytes__*",), _BNB),
    _Scheme("bitsandbytes (8 bit)", ("bitsandbytes",), ("*.SCB",), _BNB),
    _Scheme("GPTQ", ("gptq",), ("*.qweight", "*.g_idx")),
    _Scheme("AWQ", ("awq",), ("*.qweight", "*.qzeros")),
    _Scheme("GPTQ or AWQ", (), ("*.qweight",)),
    _Scheme("EXL2", ("exl2",), ("*.q_weight",)),
    _Scheme("compressed-tensors", ("compressed-tensors",), ("*.weight_packed",), _LOADED.format("CompressedTensorsConfig")),
    _Scheme("MXFP4", ("mxfp4",), ("*_blocks", "*_scales"), _LOADED.format("Mxfp4Config")),
    _Scheme("HQQ", ("hqq",), ("*.W_q",)),
    _Scheme("quanto", ("quanto",), ("*._data", "*._scale")),
    _Scheme("AQLM", ("aqlm",), ("*.codes", "*.codebooks")),
    _Scheme("VPTQ", ("vptq",), ("*.indices", "*.centroids.weight")),
    _Scheme("EETQ", ("eetq",), ("*.weight_scales",)),
    _Scheme("FP8", ("fp8", "fbgemm_fp8"), (), _LOADED.format("FineGrainedFP8Config")),
)


def parts_of(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The config of a model and those of its parts, as `text_config`."""
    whole = config or {}
    return [whole, *(v for k, v in whole.items() if k.endswith("_config") and k not in CONFIG_KEYS and isinstance(v, Mapping))]


def quantisation_in(config: Mapping[str, Any] | None) -> str | None:
    """The method that a config (or a part of it, as of its text) says it is quantised by, or None."""
    for part in parts_of(config):
        for key in CONFIG_KEYS:
            if settings := part.get(key):
                return str(settings.get("quant_method", "no method named") if isinstance(settings, Mapping) else "not a table")
    return None


def quantised(source: str, tensors: Collection[Tensor], config: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a model if its tensors are quantised, by the name of the scheme and with the way to dequantise it."""
    integers = {t.name for t in tensors if t.dtype not in FLOAT_DTYPES and t.dtype != "BOOL"}
    # Not the masks and position ids that many models have.
    weights = {t.name for t in tensors if t.name in integers and len(t.shape) >= 2 and t.name.endswith("weight")}
    for scheme in _SCHEMES:
        matched = [{t.name for t in tensors if fnmatchcase(t.name, pattern)} for pattern in scheme.patterns]
        packed = set().union(*matched) & integers or weights
        if matched and all(matched) and packed:
            return _problem(source, scheme.name, packed, scheme.fix)
    if weights:
        method = quantisation_in(config)
        named = next((scheme for scheme in _SCHEMES if method in scheme.of_config), None)
        name = named.name if named else f"{show(method)}, as its config says" if method else "a scheme that no config names"
        return _problem(source, name, weights, named.fix if named else ANOTHER_FORM)
    return None


def _problem(source: str, scheme: str, found: Collection[str], fix: str) -> str:
    first = min(found)
    what = f"{len(found)} of integers (first: {show(first)}) that belong to a model quantised by {scheme}, which is not supported"
    return f"model {source}: {mismatch('floating-point tensors', what, fix)}"


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what it says of quantisation, in its parts too."""
    return {
        key: without_settings(value) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }
