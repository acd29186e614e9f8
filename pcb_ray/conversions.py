"""How transformers renames, packs and splits the tensors of a model between its files and its modules, from its own tables.

A model whose state dict was saved as it lies in memory has other names and shapes than one that `save_pretrained` wrote (experts
one by one in files, packed in memory; q, k and v in one tensor in files, three in memory). Both are the same numbers at other
places; where, is read off views of a model without data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pcb_ray")


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
    """The conversions of the model that this config.json describes; None where transformers is not installed or does not know it.

    No weights are loaded, and no code of the model's is run."""
    kept = {key: value for key, value in (config or {}).items() if key != "quantization_config"}
    names = kept.get("architectures")
    if not isinstance(kept.get("model_type"), str) or not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)  # it has the numbers of Python's
    try:
        kind = getattr(transformers, names[0], None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            return None
        with torch.device("meta"):
            module = kind(transformers.AutoConfig.for_model(kept.pop("model_type"), **kept))
        return _conversions(module)
    except Exception as error:  # whatever a config leads to there: then names are compared as they are, and a mismatch is told
        log.info("transformers can't tell how %s is saved: %r", names[0], error)
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)


def _conversions(module: Any) -> Conversions:
    own: dict[str, torch.Tensor] = {name: t.detach() for name, t in module.state_dict(keep_vars=True).items()}
    joined: dict[int, list[torch.Tensor]] = {}
    saved = as_saved(module, dict(own), joined)
    name_of = {id(tensor): name for name, tensor in own.items()}
    saved_as: dict[str, str] = {}
    pieces: dict[str, dict[str, Piece]] = {}
    for name, tensor in saved.items():
        if id(tensor) in joined:  # several in memory are one in files
            found: dict[str, Piece] = {}
            first = 0
            for part in joined[id(tensor)]:
                if (own_name := name_of.get(id(part))) is not None:
                    found[own_name] = Piece(first, tuple(part.shape))
                first += part.numel()
            if len(found) == len(joined[id(tensor)]):
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


def as_saved(
    module: Any, tensors: dict[str, torch.Tensor], joined: dict[int, list[torch.Tensor]] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a model of transformers by the names that `save_pretrained` gives them, as views of the given ones as far as
    that is possible. What is put together by rows has, by its `id` in `joined`, what it was put together from."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.core_model_loading import revert_weight_conversion

    class Uncopied(TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.contiguous, torch.Tensor.clone):
                return args[0]
            result = func(*args, **(kwargs or {}))
            if func is torch.cat and joined is not None and (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) == 0:
                joined[id(result)] = list(args[0] if args else (kwargs or {})["tensors"])
            return result

    with Uncopied():
        return dict(revert_weight_conversion(module, tensors))
