"""Small families of checkpoints, in memory and on disk: a base and models that were fine-tuned from it.

Everything is seeded; the same arguments give the same family.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcb_ray import Recipe, steps
from pcb_ray.analysis import analyse
from pcb_ray.files.store import LocalStore
from pcb_ray.local import LocalOwners
from pcb_ray.methods import Known
from pcb_ray.output.companions import side_files
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State, asked_of
from pcb_ray.planning import Plan, Sizes, open_inputs, plan_of
from pcb_ray.questions import WriteParts
from pcb_ray.session import Session

StateDict = dict[str, Tensor]

# A language model in miniature: 19,552 elements.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (256, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.1.self_attn.q_proj.weight": (32, 32),
    "model.layers.1.self_attn.o_proj.weight": (32, 32),
    "model.layers.1.mlp.up_proj.weight": (64, 32),
    "model.layers.1.input_layernorm.weight": (32,),
    "model.norm.weight": (32,),
    "lm_head.weight": (96, 32),
}
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def fine_tuned(
    n: int = 3,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    scale: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    touched: float = 0.7,
) -> tuple[StateDict, list[StateDict]]:
    """A base and n models. The first dimensions are multiplied by `scale`; about the share `touched` of the elements differs
    from the base, with a spread that grows along the model, as in real ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int], sigma: float) -> Tensor:
        return torch.randn(tuple(shape), generator=generator) * sigma

    sizes = {name: (shape[0] * scale, *shape[1:]) if shape else () for name, shape in (shapes or SHAPES).items()}
    base = {name: normal(shape, 0.05).to(dtype) for name, shape in sizes.items()}
    models = []
    for _ in range(n):
        model = {}
        for k, (name, theta) in enumerate(base.items()):
            mask = torch.rand(theta.shape, generator=generator) < touched
            model[name] = (theta.float() + mask * normal(theta.shape, 0.002 * (1 + k / len(base)))).to(dtype)
        models.append(model)
    return base, models


def write(folder: Path, state: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = CONFIG) -> Path:
    """A checkpoint as transformers saves it, in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensor for at, (name, tensor) in enumerate(state.items()) if at * shards // len(state) == k}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> StateDict:
    """All tensors of a folder's `.safetensors` files, read by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@dataclass
class Family:
    """A family on disk: folder/base, folder/model0, folder/model1, ..."""

    folder: Path
    base: StateDict
    models: list[StateDict]
    shards: int = 1
    config: Mapping[str, Any] | None = field(default_factory=lambda: dict(CONFIG))

    def __post_init__(self) -> None:
        write(self.folder / "base", self.base, shards=self.shards, config=self.config)
        for k, model in enumerate(self.models):
            write(self.folder / f"model{k}", model, shards=self.shards, config=self.config)

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe as YAML reads it, with absolute paths; `parameters` and all other keys can be changed."""
        return {
            "merge_method": "pcb",
            "base_model": str(self.folder / "base"),
            "models": [{"model": str(self.folder / f"model{k}")} for k in range(len(self.models))],
            **changes,
        }

    def recipe_file(self, name: str = "recipe.yaml", **changes: Any) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(self.recipe(**changes)))
        return path


MakeFamily = Callable[..., Family]


class Local(NamedTuple):
    files: dict[str, bytes]
    session: Session
    known: Known

    @property
    def bytes_read(self) -> int:
        """As the owners counted."""
        return sum(state.bytes_read for state in self.session.owners.states)


def merge_locally(
    plan: Plan, out: Path, *, block_elements: int | None = None, threads: int | None = None, parts: Sequence[int] | None = None
) -> Local:
    """The merge of a plan into the folder `out` without Ray. `parts` is the order in which the parts are written."""
    out.mkdir(parents=True, exist_ok=True)
    store = LocalStore()
    session = Session(plan, lambda plan: LocalOwners(plan, store, block_elements=block_elements, threads=threads))
    known = analyse(session)
    for file in plan.files:
        store.create(str(out / file.name), file.size)
    for _ in session.store("write", WriteParts(known, str(out)), range(len(plan.parts)) if parts is None else parts):
        pass
    return Local({file.name: (out / file.name).read_bytes() for file in plan.files}, session, known)


def merged_to(out: Path, recipe: Recipe) -> Path:
    """`out` as `merge` writes it, without Ray: the same steps."""
    inputs, store = open_inputs(recipe), LocalStore()
    made = plan_of(recipe, inputs)
    with State(Folder(out), asked_of(made, steps.ARITHMETIC, {}), {}) as state:
        files = side_files(recipe, made, inputs.base, inputs.tokenizer)
        session = Session(made, lambda plan: LocalOwners(plan, store), quiet=True, relate=True)
        known = analyse(session)
        output = steps.write(session, store, known, state.place.files, state)
        measured: dict[str, Any] = {"sweeps": session.sweeps, "spent": steps.Spent(), "startup_s": 0.0, "resumed": False}
        steps.publish(session, state, store, known, output, files, max_shard_bytes=5 * 10**9, **measured)
    return out


def small_sizes(tally_entries: int = 64, chunk_elements: int = 64, sample_run: int = 16) -> Sizes:
    """Sizes so small that little data is sampled, lies in several chunks, and overflows a tally into further sweeps."""
    return Sizes(chunk_elements, copy_bytes=64, sample_run=sample_run, sample_stride=16 * sample_run, tally_entries=tally_entries)


@contextlib.contextmanager
def small_engine(tally_entries: int = 64, chunk_elements: int = 64, sample_run: int = 16) -> Iterator[None]:
    """Plans have these sizes meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizes, "of", classmethod(lambda _cls, _D: small_sizes(tally_entries, chunk_elements, sample_run)))
        yield
