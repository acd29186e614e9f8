"""Trains a family of small language models on text that every machine with Python and PyTorch has.

A base model learns from a mix of three domains; one expert per domain is then fine-tuned from the saved base. Each model is
a complete Hugging Face folder: config, bfloat16 weights, tokenizer. Files, not lines, are split into train, validation and
test, and no paragraph of a held-out file is ever trained on.

Names: T tokens of context.
"""

from __future__ import annotations

import hashlib
import json
import platform
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_T = 128
# So small a base gains more from many steps than from large batches; experts that are to be merged gain from less noise.
BASE_STEPS, BASE_BATCH, BASE_LR = 900, 4, 3e-3
EXPERT_STEPS, EXPERT_BATCH, EXPERT_LR = 120, 8, 1e-3
TEST_WINDOWS, VALIDATION_WINDOWS = 96, 48  # per domain, CONTEXT_T tokens each
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.10  # of a domain's files
TRAIN_BYTES = 1_500_000  # per domain, at most
SHARED_PARAGRAPH_CHARS = 80  # shorter ones ("else:", "return NULL;") are common property, not a leak
SEED = 0
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}

Texts = dict[str, str]  # file name -> text
Windows = dict[str, torch.Tensor]  # domain -> (windows, CONTEXT_T) token ids


def read_domains() -> dict[str, Texts]:
    """The texts of each domain by file name; a topic of Python's documentation counts as a file."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    not_code = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "pydoc_data"}
    headers = Path(torch.__file__).parent / "include"
    tops = (headers / name for name in ("ATen", "c10", "torch"))
    return {
        # ATen/ops holds thousands of generated near-copies.
        "cpp": _read(headers, (path for top in tops for path in top.rglob("*.h") if path.parent.name != "ops")),
        "docs": dict(pydoc_data.topics.topics),
        "python": _read(stdlib, (p for p in stdlib.rglob("*.py") if not not_code & set(p.relative_to(stdlib).parts))),
    }


def _read(root: Path, paths: Iterator[Path]) -> Texts:
    """UTF-8 files of 1 to 60 kB: smaller ones are stubs, larger ones generated tables."""
    small = (path for path in paths if 1_000 < path.stat().st_size < 60_000)
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in small}


def split_by_file(texts: Texts) -> dict[str, list[str]]:
    """Texts of `test`, `validation` and `train`: the same files on every run, none with a paragraph of an earlier split."""
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    ends = [int(len(names) * share) for share in (0, TEST_SHARE, TEST_SHARE + VALIDATION_SHARE, 1)]
    splits: dict[str, list[str]] = {}
    held_out: set[str] = set()
    for split, start, end in zip(("test", "validation", "train"), ends, ends[1:], strict=False):
        splits[split] = []
        for paragraphs in (texts[name].split("\n\n") for name in names[start:end]):
            kept = [p for p in paragraphs if len(p) < SHARED_PARAGRAPH_CHARS or p not in held_out]
            splits[split].append("\n\n".join(kept))
        held_out.update(p for text in splits[split] for p in text.split("\n\n"))
    sizes = np.cumsum([len(text) for text in splits["train"]])
    splits["train"] = splits["train"][: int(np.searchsorted(sizes, TRAIN_BYTES)) + 1]
    return splits


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written with it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<end>", eos_token="<end>")


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of token ids, `<end>` after each text."""
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    return torch.tensor(stream)


def windows(stream: torch.Tensor, count: int) -> torch.Tensor:
    """`count` windows spread evenly over the stream, so that each of its files is seen."""
    starts = torch.linspace(0, len(stream) - CONTEXT_T, count).long()
    return torch.stack([stream[start : start + CONTEXT_T] for start in starts])


def next_token_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, split: Windows) -> dict[str, float]:
    """Loss per domain, in nats per token."""
    model.eval()
    return {domain: float(next_token_loss(model, tokens)) for domain, tokens in split.items()}


def train(model: torch.nn.Module, streams: list[torch.Tensor], title: str, steps: int, batch_size: int, peak_lr: float) -> None:
    """AdamW with warm-up and a cosine to zero; the streams take turns, so each gives the same share of all batches."""
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    warm_up = max(steps // 20, 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
    )
    model.train()
    started_s = time.perf_counter()
    for step in range(1, steps + 1):
        picks = [streams[i % len(streams)] for i in range((step - 1) * batch_size, step * batch_size)]
        starts = [int(torch.randint(len(stream) - CONTEXT_T, (), generator=random)) for stream in picks]
        batch = torch.stack([s[i : i + CONTEXT_T] for s, i in zip(picks, starts, strict=True)])
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 300 == 0 or step == steps:
            elapsed_s = time.perf_counter() - started_s
            print(f"  {title:<14} step {step:>3}/{steps}   training loss {loss.item():.2f}   {elapsed_s:4.0f} s", flush=True)


def train_family(out: Path) -> None:
    """Writes `out/base`, `out/<domain>` for each expert, the held-out windows, and `family.json` when all is there."""
    splits = {domain: split_by_file(texts) for domain, texts in read_domains().items()}
    for domain, split in splits.items():
        sizes = ", ".join(f"{len(split[s])} files for {s}" for s in ("train", "validation", "test"))
        print(f"  {domain:<7} {sizes}")
    tokenizer = train_tokenizer([text for split in splits.values() for text in split["train"]])
    streams = {domain: {name: tokenize(tokenizer, t) for name, t in split.items()} for domain, split in splits.items()}
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("test", TEST_WINDOWS), ("validation", VALIDATION_WINDOWS)):
        save_file({d: windows(s[split], count).numpy() for d, s in streams.items()}, out / f"{split}.safetensors")

    torch.manual_seed(SEED)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, **special))
    print(f"  a Llama of {base.num_parameters() / 1e6:.1f} million parameters")
    train(base, [s["train"] for s in streams.values()], "base", BASE_STEPS, BASE_BATCH, BASE_LR)
    _save(base, tokenizer, out / "base")
    for domain, stream in streams.items():
        # From the saved file: an expert starts from the base that it is later compared with, rounding included.
        expert = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        # With free embeddings, each expert would mostly learn that the other domains' tokens are rare.
        expert.get_input_embeddings().requires_grad_(False)
        train(expert, [stream["train"]], f"expert {domain}", EXPERT_STEPS, EXPERT_BATCH, EXPERT_LR)
        _save(expert, tokenizer, out / domain)
    (out / "family.json").write_text(json.dumps(settings(), indent=2))


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_held_out(family: Path, split: str) -> Windows:
    return {domain: torch.from_numpy(tokens) for domain, tokens in load_file(family / f"{split}.safetensors").items()}


class HeldOutLoss:
    """The evaluator of the search: the loss on each domain of a split, and their mean."""

    def __init__(self, family: str) -> None:
        self.family = Path(family)

    def load(self, model_dir: Path) -> torch.nn.Module:
        self.splits = {split: read_held_out(self.family, split) for split in ("validation", "test")}
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        return self.model

    def score(self, split: str) -> dict[str, float]:
        losses = held_out_loss(self.model, self.splits[split])
        return {**losses, "mean": sum(losses.values()) / len(losses)}


def settings() -> dict[str, object]:
    """What the family depends on: a saved one is used again only if this is unchanged."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"versions": versions, "train_family.py": code}


def is_trained(family: Path) -> bool:
    record = family / "family.json"
    return record.exists() and json.loads(record.read_text()) == settings()
