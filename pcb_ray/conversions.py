"""How transformers renames, packs and splits the tensors of a model between its files and its modules, from its own tables.

A model whose state dict was saved as it lies in memory has other names and shapes than one that `save_pretrained` wrote (experts
one by one in files, packed in memory; q, k and v in one tensor in files, three in memory). Both are the same numbers at other
places; where, is read off views of a model without data.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pcb_ray.matrices import Layer

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pcb_ray")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies in another one: its first element there, and its shape."""

    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Conversions:
    """What a class of models saves otherwise than it has it in memory."""

    saved_as: dict[str, str]
    """By its name in memory, the name in files of what is renamed alone."""
    pieces: dict[str, dict[str, Piece]]
    """By the name of a packed tensor (in memory or in files), the tensors that it consists of, as the other side names them."""


def conversions_of(config: Mapping[str, Any] | None) -> Conversions | None:
    """The conversions of the model that this config.json describes; None where transformers is not there or does not know it."""
    return _of_class(config, _conversions)


def tied_weights_of(config: Mapping[str, Any] | None) -> dict[str, str] | None:
    """By the name in files of each tensor that the class of this config.json ties, that of what it ties it to; None likewise."""
    return _of_class(config, _tied_weights)


def _tied_weights(module: Any) -> dict[str, str]:
    saved_as = _conversions(module).saved_as
    return {saved_as.get(name, name): saved_as.get(to, to) for name, to in module.all_tied_weights_keys.items()}


def layers_of(config: Mapping[str, Any] | None) -> dict[str, Layer] | None:
    """By the name in files of each tensor of the class of this config.json, how its layer stores it; None likewise."""
    return _of_class(config, _layers)


TURNED_EXPERTS = ("Llama4TextExperts",)
"""Classes that store [expert, inputs, outputs] and don't say so."""


def _layers(module: Any) -> dict[str, Layer]:
    saved_as, pieces = (conversions := _conversions(module)).saved_as, conversions.pieces
    ends = set()
    for end in (module.get_input_embeddings, module.get_output_embeddings):
        with contextlib.suppress(NotImplementedError, AttributeError):  # classes without one
            ends.add(id(end().weight))
    found: dict[str, Layer] = {}
    for prefix, layer in module.named_modules():
        for own_name, tensor in layer.named_parameters(recurse=False):
            name = f"{prefix}.{own_name}" if prefix else own_name
            kind: Layer = "none" if id(tensor) in ends else _layer(layer, own_name, tensor.ndim)
            found[saved_as.get(name, name)] = kind
            # Experts that files have one by one are matrices of their own, and so are layers that files have apart.
            for piece, where in pieces.get(name, {}).items():
                found[piece] = kind if len(where.shape) == tensor.ndim or kind == "none" else "rows"
    for whole, parts in pieces.items():  # several in memory are one in files
        kinds = {found[part] for part in parts if part in found}
        if whole not in found and len(kinds) == 1:
            found[whole] = kinds.pop()
    return found


def _layer(layer: Any, name: str, dimensions: int) -> Layer:
    kind = type(layer).__name__
    if kind.endswith("Experts") and dimensions == 3:
        return "column stack" if getattr(layer, "is_transposed", False) or kind in TURNED_EXPERTS else "row stack"
    is_weight = name in ("weight", "in_proj_weight") and dimensions >= 2 and "Embedding" not in kind
    return ("columns" if kind == "Conv1D" or "ConvTranspose" in kind else "rows") if is_weight else "none"


def _of_class(config: Mapping[str, Any] | None, told: Callable[[Any], _T]) -> _T | None:
    kept = {key: value for key, value in (config or {}).items() if key != "quantization_config"}
    found: _T | None = _asked(json.dumps(kept), told)
    return found


@functools.lru_cache(maxsize=64)  # the models of a merge have few configs, and plans of them are made again
def _asked(config: str, told: Callable[[Any], Any]) -> Any:
    """What is told of a model of this config without data. No weights are loaded, and no code of the model's is run."""
    kept = json.loads(config)
    names = kept.get("architectures")
    if not isinstance(kept.get("model_type"), str) or not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        import torch
        import transformers

        logger.setLevel(logging.ERROR)
        kind = getattr(transformers, names[0], None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            return None
        with torch.device("meta"):
            module = kind(transformers.AutoConfig.for_model(kept.pop("model_type"), **kept))
        return told(module)
    except ImportError:
        return None
    except Exception as error:  # whatever a config leads to there: then names are compared as they are, and a mismatch is told
        log.info("transformers can't tell how %s is saved: %r", names[0], error)
        return None
    finally:
        logger.setLevel(level)


Joined = dict[int, tuple[Any, list[Any]]]
"""By the `id` of a tensor that was put together by rows: itself, so that no other gets its `id`, and its parts."""


def _conversions(module: Any) -> Conversions:
    own: dict[str, torch.Tensor] = {name: t.detach() for name, t in module.state_dict(keep_vars=True).items()}
    joined: Joined = {}
    saved = as_saved(module, dict(own), joined)
    name_of = {id(tensor): name for name, tensor in own.items()}
    saved_as: dict[str, str] = {}
    pieces: dict[str, dict[str, Piece]] = {}
    for name, tensor in saved.items():
        if id(tensor) in joined:  # several in memory are one in files
            found: dict[str, Piece] = {}
            first = 0
            for part in joined[id(tensor)][1]:
                if (own_name := name_of.get(id(part))) is not None:
                    found[own_name] = Piece(first, tuple(part.shape))
                first += part.numel()
            if len(found) == len(joined[id(tensor)][1]):
                pieces[name] = found
            continue
        root = tensor
        while id(root) not in name_of and root._base is not None:
            root = root._base
        own_name = name_of.get(id(root))
        if own_name is None or not tensor.is_contiguous():  # it is made anew, or turned
            continue
        if tensor.numel() == root.numel() and tensor.shape == root.shape:
            saved_as |= {own_name: name} if name != own_name else {}
        else:
            pieces.setdefault(own_name, {})[name] = Piece(int(tensor.storage_offset()), tuple(tensor.shape))
    sizes = {name: tensor.numel() for name, tensor in {**saved, **own}.items()}
    whole = {name: of for name, of in pieces.items() if sum(sizes[one] for one in of) == sizes[name]}
    return Conversions(saved_as, whole)


def as_saved(module: Any, tensors: dict[str, torch.Tensor], joined: Joined | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a model of transformers by the names that `save_pretrained` gives them, as views of the given ones as far as
    that is possible. Of what is put together by rows, `joined` gets what it was put together from."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.core_model_loading import revert_weight_conversion

    class Uncopied(TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.contiguous, torch.Tensor.clone):
                return args[0]
            result = func(*args, **(kwargs or {}))
            if func is torch.cat and joined is not None and (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) == 0:
                joined[id(result)] = result, list(args[0] if args else (kwargs or {})["tensors"])
            return result

    with Uncopied():
        return dict(revert_weight_conversion(module, tensors))
