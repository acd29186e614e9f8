"""Evaluators: which are refused and how, how their module is matched to the merge, and what the built-in ones score; without
Ray."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from clusters import DEADLINE_S, await_that, lives
from families import CONFIG, Family, fine_tuned
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import junk, places, replaced

from pcb_ray import Recipe, RequestError, RunError
from pcb_ray.errors import with_place
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.stores import open_store
from pcb_ray.planning import plan
from pcb_ray.searching.evaluators import check_splits, make_evaluator, match, module_of
from pcb_ray.searching.nearby import Material, make_model_dir, model_files
from pcb_ray.searching.request import BUILT_IN, Search, Space
from pcb_ray.searching.scorer import Arm, Job, Scorer
from pcb_ray.user_code import read_code

EVALUATORS = Path(__file__).parent / "evaluators_of_tests.py"
TOKEN = "hf_" + 34 * "x"
OPTIONS: dict[str, dict[str, Any]] = {
    "causal_lm": {"data": {"val": "val.txt"}, "length": 512, "batch": 8, "text": "text", "tokens": 1000, "dtype": "auto"},
    "classification": {
        "data": {"val": {"a": "val.txt"}},
        "text": "text",
        "label": "y",
        "length": 512,
        "batch": 8,
        "dtype": "float32",
    },
    "lm_eval": {
        "tasks": {"val": ["a", "b"], "test": "c"},
        "include_path": ".",
        "num_fewshot": 0,
        "limit": 100,
        "chat_template": False,
        "batch": 8,
        "dtype": "bfloat16",
    },
    "command": {"run": "python eval.py {model} {split}", "scratch": ".", "timeout": 60},
}
"""Of the built-in evaluators: all that there are, the required one first."""


def job_of(family: Family, evaluator: Any, metric: str = "near") -> Job:
    recipe = Recipe.from_dict(family.recipe(search={"evaluator": evaluator, "metric": metric}))
    made = plan(recipe)
    search = Search.of(recipe, has_evaluator=False)
    arm = Arm(made, "nowhere", {})
    own = search.evaluator not in BUILT_IN
    code = read_code(search.evaluator, family.folder, "search.evaluator", allow_code=True) if own else None
    space = Space.of(search, made.recipe, made)
    return Job(search, space, {"pairwise": arm}, Material({}, str(family.folder / "base")), str(family.folder), code=code)


def made_of(name: str, folder: Path) -> Any:
    return make_evaluator(name, {}, folder, read_code(name, folder, "search.evaluator", allow_code=True))


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("Lacking", False, "Lacking lacks score"),
        ("not_an_evaluator", False, "lacks load and score"),
        ("not_an_evaluator", True, "wanted no options for the object"),
        ("Nearest", True, "wanted 'Nearest' in it, found no such name"),
        ("Near", False, "missing a required argument: 'target'"),
        ("WrongModule", True, "wanted a module with the 11 merged tensors, found one without 11 of them"),
        ("NoModule", True, "wanted a torch.nn.Module from load(), found str"),
        ("NoNumber", True, "near = 'high'"),
        ("NoDict", True, "wanted a dict of numbers from score('val'), found float"),
    ],
)
def test_a_wrong_evaluator_is_refused_with_a_fix(family, name, options, complaint):
    made = family(2)
    given = {"target": str(made.folder / "model0" / "model.safetensors")}
    evaluator = {f"{EVALUATORS}:{name}": given} if options else f"{EVALUATORS}:{name}"
    with pytest.raises(RequestError) as caught:
        Scorer(job_of(made, evaluator)).score_input(0, "val")
    assert complaint in str(caught.value)
    assert "Fix:" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("nowhere.py:X", "No such file"), ("no_such_module:X", "ModuleNotFoundError"), ("broken.py:X", "ZeroDivisionError")],
)
def test_an_evaluator_that_cant_be_loaded_is_named_with_what_happened(tmp_path, name, complaint):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RequestError, match=rf"search.evaluator: .*{complaint}.* Fix: "):
        made_of(name, tmp_path)


def test_a_module_beside_the_recipe_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", ["/usr/lib"])
    (tmp_path / "beside_the_recipe.py").write_text("class E:\n    def load(self, d): ...\n    def score(self, s): ...\n")
    assert made_of("beside_the_recipe:E", tmp_path).__class__.__name__ == "E"


def test_a_model_is_scored_by_its_merged_tensors_and_the_base_comes_back(family):
    made = family(2)
    target = str(made.folder / "model0" / "model.safetensors")
    scorer = Scorer(job_of(made, {f"{EVALUATORS}:Near": {"target": target}}))
    of_base = scorer.score_input(0, "val")["near"]
    assert of_base < 0.0
    assert scorer.score_input(1, "val")["near"] == 0.0
    assert scorer.score_input(2, "val")["near"] < 0.0
    assert scorer.score_input(0, "val")["near"] == of_base


@pytest.mark.parametrize("source", [0, 1])
def test_a_stored_copy_of_a_tied_tensor_follows_its_original(tmp_path, source):
    """`command` writes the files that the base has: a copy that stayed behind would be scored by whoever reads it."""
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    base, models = fine_tuned(2, shapes=shapes)
    for state in (base, *models):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    made = Family(tmp_path, base, models, config=CONFIG | {"tie_word_embeddings": True})
    (tmp_path / "base" / "sums.py").write_text(
        "import sys, json; from safetensors.torch import load_file\n"
        "print(json.dumps({k: float(v.double().sum()) for k, v in load_file(sys.argv[1] + '/model.safetensors').items()}))"
    )
    run = f"python {tmp_path / 'base' / 'sums.py'} {{model}}"
    found = Scorer(job_of(made, {"command": {"run": run}}, "lm_head.weight")).score_input(source, "val")
    expected = (base, *models)[source]
    assert found == {name: float(t.double().sum()) for name, t in expected.items()}


# --- errors -----------------------------------------------------------------------------------------------------------------------

MINE = f"""
import torch
from pathlib import Path
from pcb_ray.searching.evaluators import module_of
from safetensors.torch import load_file

def read(where):
    if where == WHERE:
        Path("{TOKEN}").read_text()  # here

class Mine:
    def __init__(self):
        read("init")

    def load(self, model_dir):
        read("load")
        return module_of(load_file(model_dir / "model.safetensors"))

    @torch.inference_mode()
    def score(self, split):
        read("score")

read("import")
"""


@pytest.fixture
def errors_of(monkeypatch) -> Callable[[Job], tuple[str, str]]:
    """The error in the record of a trial, and that of scoring the base; without Ray, and in this process as it is."""
    from pcb_ray.searching.references import _ScorerActor
    from pcb_ray.searching.trial import Trial

    def both(job: Job) -> tuple[str, str]:
        trial = object.__new__(Trial)
        trial.setup({}, job, known={})
        trial.config = job.space.start
        with pytest.raises((RequestError, RunError)) as caught:
            _ScorerActor(job).score(0, "val")
        try:
            return trial.step()["error"], str(caught.value)
        except RuntimeError as error:  # one that could not load ends its process
            return str(error), str(caught.value)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.chdir(Path.cwd())  # as it was, afterwards
    monkeypatch.setattr("pcb_ray.searching.basis.Basis", Mock())  # a candidate is the base
    return both


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["import", "init", "load", "score"])
def test_what_an_evaluator_raises_is_told_with_its_line_in_the_users_file_and_without_secrets(family, errors_of, where):
    made = family(2)
    source = MINE.replace("WHERE", repr(where))
    (made.folder / "mine.py").write_text(source)
    line = 1 + next(k for k, text in enumerate(source.splitlines()) if "# here" in text)
    for error in errors_of(job_of(made, "mine.py:Mine")):
        assert f"FileNotFoundError: [Errno 2] No such file or directory: '***' (mine.py:{line})" in error
        assert "\n" not in error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_file_of_the_users_the_line_in_an_installed_package_is_told(family, errors_of):
    made = family(2)
    for split in ("val", "test"):
        (made.folder / split).write_text("x")
    for error in errors_of(job_of(made, {"causal_lm": {"data": {"val": "val", "test": "test"}}})):
        assert re.search(r"\(\w+\.py:\d+\)$", error)
        assert "(evaluators.py" not in error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_pcb_ray_itself_raises_has_no_line(family, errors_of):
    for error in errors_of(job_of(family(2), {"command": {"run": "exit 3 # {model}"}})):
        assert re.fullmatch(r"(score\('val'\) raised )?RuntimeError: 'exit 3 # .*' ended with code 3: it printed nothing", error), (
            error
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("lost", [False, True])
def test_an_error_that_takes_the_gpu_ends_the_process(family, monkeypatch, lost):
    """After some of them all that follows on that GPU fails: here the GPU only says so."""
    from pcb_ray.searching.trial import Trial

    made = family(2)
    (made.folder / "mine.py").write_text(MINE.replace("WHERE", "'score'"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr("pcb_ray.searching.basis.Basis", Mock())
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    trial = object.__new__(Trial)
    job = job_of(made, "mine.py:Mine")
    trial.setup({}, job, known={})
    trial.config = job.space.start
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=RuntimeError("device-side assert") if lost else None))
    if lost:
        with pytest.raises(FileNotFoundError):
            trial.step()
    else:
        assert "FileNotFoundError" in trial.step()["error"]


def test_a_bare_assertion_is_told_by_its_line():
    with pytest.raises(AssertionError) as caught:
        raise AssertionError
    assert re.fullmatch(r"AssertionError \(test_evaluators.py:\d+\)", with_place(caught.value))


@pytest.mark.parametrize("kind", [np.float32, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(family, kind):
    made = family(2)
    target = str(made.folder / "model0" / "model.safetensors")
    scorer = Scorer(job_of(made, {f"{EVALUATORS}:Near": {"target": target}}))
    scorer.evaluator.score = lambda split: {"near": kind(0.25)}
    assert scorer.score_input(0, "val") == {"near": 0.25}
    scorer.evaluator.score = lambda split: {"near": torch.zeros(10_000)}
    with pytest.raises(RequestError, match=r"near = .{1,60}\. Fix: return numbers"):
        scorer.score_input(0, "val")


def test_windows_are_no_longer_than_the_model_has_positions(language_model, tmp_path):
    config = json.loads((language_model / "config.json").read_text())
    shutil.copytree(language_model, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9}))
    (tmp_path / "val.txt").write_text(" ".join(WORDS * 3))
    evaluator = make_evaluator("causal_lm", {"data": {"val": "val.txt"}}, tmp_path)
    evaluator.load(tmp_path / "short")
    by_default = evaluator.score("val")
    asked = make_evaluator("causal_lm", {"data": {"val": "val.txt"}, "length": 9}, tmp_path)
    asked.load(tmp_path / "short")
    assert by_default == asked.score("val")
    asked = make_evaluator("causal_lm", {"data": {"val": "val.txt"}, "length": 8}, tmp_path)
    asked.load(tmp_path / "short")
    assert by_default != asked.score("val")


# --- names ------------------------------------------------------------------------------------------------------------------------


def test_match_finds_a_prefix_on_either_side():
    module = torch.nn.Module()
    module.add_module("model", torch.nn.Linear(2, 3))
    assert match(module, {"weight": (3, 2), "bias": (3,)})["weight"] is module.model.weight
    shapes = {"outer.model.weight": (3, 2), "outer.model.bias": (3,)}
    assert match(module, shapes)["outer.model.bias"] is module.model.bias


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "architecture", ["ViTForImageClassification", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel"]
)
def test_match_finds_what_transformers_has_renamed_or_fused(tmp_path, architecture, wrapped):
    """The claim: what is written through the match is what the module would have loaded from a file that says so."""
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixture = small | {
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "num_local_experts": 3,
        "num_experts": 3,
        "moe_intermediate_size": 8,
    }
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}
    kind = getattr(transformers, architecture)
    config = {"ViT": small | {"image_size": 8, "patch_size": 4}, "GPT": gpt2}.get(architecture[:3], mixture)
    kind(kind.config_class(**config)).save_pretrained(tmp_path / "model")
    model = kind.from_pretrained(tmp_path / "model", dtype=torch.float32)
    saved = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    found = match(torch.nn.ModuleDict({"inner": model}) if wrapped else model, {name: tuple(t.shape) for name, t in saved.items()})
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    other = {name: torch.randn_like(tensor) for name, tensor in saved.items()}
    for name, tensor in found.items():
        tensor.data.copy_(other[name])
    safetensors.torch.save_file(other, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    expected = kind.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_match_takes_buffers_and_both_names_of_tied_parameters():
    module = torch.nn.Module()
    module.a, module.b = (torch.nn.Embedding(4, 2) for _ in range(2))
    module.b.weight = module.a.weight
    module.register_buffer("mean", torch.zeros(2))
    found = match(module, {"b.weight": (4, 2), "mean": (2,)})
    assert found["b.weight"] is module.a.weight
    assert found["mean"] is module.mean


def test_tensors_that_match_nothing_are_listed_with_the_modules_own():
    module = module_of({"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)})
    with pytest.raises(RequestError, match=r"the 2 merged tensors, found one without 1 of them, c.weight; .*b.weight"):
        match(module, {"a.weight": (2,), "c.weight": (2,)})


def test_tensors_without_data_are_refused():
    """As where a model was offloaded: an update of them would be lost."""
    with pytest.raises(
        RequestError, match=r"wanted a module with all its data, found 1 tensors offloaded.*a.weight.*Fix: load all"
    ):
        match(module_of({"a.weight": torch.zeros(2, device="meta"), "b": torch.zeros(1)}), {"a.weight": (2,), "b": (1,)})


def test_a_text_in_jsonl_may_hold_what_other_formats_end_lines_with(language_model, tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps({"text": "the merge\u2028of many\u0085models"}, ensure_ascii=False) + "\n\n")
    evaluator = make_evaluator("causal_lm", {"data": {"val": "val.jsonl"}}, tmp_path)
    evaluator.load(language_model)
    assert evaluator.score("val")["loss"] > 0


def test_another_shape_is_an_error_with_both():
    with pytest.raises(RequestError, match=r"wanted the shape \[3\] of the merge, found \[2\] in the evaluator"):
        match(module_of({"a.weight": torch.zeros(2)}), {"a.weight": (3,)})


# --- built in ---------------------------------------------------------------------------------------------------------------------

WORDS = [
    "the",
    "merge",
    "of",
    "many",
    "models",
    "keeps",
    "what",
    "each",
    "of",
    "them",
    "knows",
    "and",
    "drops",
    "what",
    "they",
    "fight",
    "about",
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, as transformers saves them."""
    return saved_model(tmp_path_factory.mktemp("lm"), "LlamaForCausalLM")


def saved_model(folder: Path, architecture: str) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: k for k, word in enumerate(["[UNK]", "[PAD]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]")
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        pad_token_id=1,
        num_labels=3,
        id2label={0: "short", 1: "middle", 2: "long"},
        label2id={"short": 0, "middle": 1, "long": 2},
    )
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    return folder


def test_causal_lm_is_the_mean_loss_per_token_of_transformers(language_model, tmp_path):
    import transformers

    text = " ".join(WORDS * 3)
    (tmp_path / "val.txt").write_text(text)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}) + "\n")
    evaluator = make_evaluator(
        "causal_lm", {"data": {"val": "val.txt", "test": {"a": "test.jsonl", "b": "val.txt"}}, "length": 7, "batch": 2}, tmp_path
    )
    evaluator.load(language_model)
    found = evaluator.score("val")
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(language_model)(text, return_tensors="pt")["input_ids"][0]
    total, count = 0.0, 0
    model.requires_grad_(False)
    for at in range(0, len(ids) - 1, 7):
        window = ids[None, at : at + 8]
        total += float(model(window, labels=window).loss) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    assert count == len(ids) - 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    of_test = evaluator.score("test")
    assert of_test["loss_b"] == found["loss"]
    assert of_test["loss"] == pytest.approx((of_test["loss_a"] + of_test["loss_b"]) / 2)


def test_classification_is_accuracy_and_loss_of_transformers(tmp_path):
    import transformers

    folder = saved_model(tmp_path / "model", "LlamaForSequenceClassification")
    rows = [{"text": " ".join(WORDS[: 1 + k % 7]), "label": ("short", "middle", "long")[k % 3]} for k in range(10)]
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    numbered = [{"sentence": row["text"], "y": ("short", "middle", "long").index(row["label"])} for row in rows]
    pyarrow.parquet.write_table(pa.Table.from_pylist(numbered), tmp_path / "val.parquet")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([row["y"] for row in numbered])
    for file, fields in (("val.jsonl", {}), ("val.parquet", {"text": "sentence", "label": "y"})):
        evaluator = make_evaluator("classification", {"data": {"val": file}, "batch": 4, **fields}, tmp_path)
        evaluator.load(folder)
        found = evaluator.score("val")
        assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


def test_command_scores_a_model_directory_and_removes_it(language_model, tmp_path):
    (tmp_path / "eval.py").write_text(
        "import sys, json, transformers, pathlib\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "pathlib.Path('seen').write_text(sys.argv[1])\n"
        "print('some noise'); print(json.dumps({'sum': float(m.lm_head.weight.sum()), 'split': len(sys.argv[2])}))\n"
    )
    evaluator = make_evaluator("command", {"run": "python eval.py {model} {split}"}, tmp_path)
    module = evaluator.load(language_model)
    parameter = match(module, {"lm_head.weight": tuple(module.get_submodule("lm_head").weight.shape)})["lm_head.weight"]
    parameter.fill_(0.5)
    assert evaluator.score("test") == {"sum": 0.5 * parameter.numel(), "split": 4}
    assert not Path((tmp_path / "seen").read_text()).exists()


def test_the_model_folder_of_a_base_with_shards_in_subfolders_is_loaded_as_the_base_itself(language_model, tmp_path):
    import transformers

    expected = safetensors.torch.load_file(language_model / "model.safetensors")
    base = tmp_path / "base"
    for number, name in enumerate(expected):
        (base / "shards" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(
            {name: expected[name]}, base / "shards" / str(number % 2) / f"{number}.safetensors", {"format": "pt"}
        )
    weight_map = {name: f"shards/{number % 2}/{number}.safetensors" for number, name in enumerate(expected)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_bytes((language_model / "config.json").read_bytes())

    files = model_files(open_checkpoint(str(base)), {"config.json": (base / "config.json").read_bytes()})
    (tmp_path / "model").mkdir()
    make_model_dir(tmp_path / "model", files, open_store())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    evaluator = make_evaluator("command", {"run": "find {model} -name '*.safetensors' | wc -l"}, tmp_path)
    assert evaluator.load(tmp_path / "model").state_dict().keys() == expected.keys()
    assert int(evaluator.score("val")) == len(expected)


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(1)"])
def test_a_command_and_its_model_go_with_the_process_that_ran_it(language_model, tmp_path, how):
    (tmp_path / "scratch").mkdir()
    code = (
        "import os, signal, sys, threading, time; from pathlib import Path; from pcb_ray.searching.evaluators import Command\n"
        "def end():\n"
        "    while not Path('pid').exists() or not Path('pid').read_text(): time.sleep(0.01)\n"
        f"    {how}\n"
        "threading.Thread(target=end).start()\n"
        "command = Command('sleep 600 & echo $! > pid; wait; ls {model}', scratch='scratch')\n"
        f"command.load(Path({str(language_model)!r}))\n"
        "command.score('val')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode != 0
    pid = int((tmp_path / "pid").read_text())
    await_that("the model is removed", lambda: not any((tmp_path / "scratch").iterdir()), DEADLINE_S)
    await_that("its process ends", lambda: not lives(pid), DEADLINE_S)


@pytest.mark.very_slow
def test_lm_eval_scores_a_task_from_a_local_folder_as_transformers_would(language_model, tmp_path):
    """The harness itself, with a multiple-choice task in YAML; the oracle adds up the log-probabilities of each choice's tokens."""
    import transformers

    rows = [
        {"question": " ".join(WORDS[k : k + 3]), "choices": [WORDS[k + 4], WORDS[k + 7], WORDS[k + 9]], "answer": k % 3}
        for k in range(7)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "words.yaml").write_text(
        "task: words\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{validation: {tmp_path / 'rows.jsonl'}}}}}\n"
        "validation_split: validation\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "tasks" / "both.yaml").write_text(
        "group: both\ntask: [words, firsts]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    (tmp_path / "tasks" / "firsts.yaml").write_text("include: words.yaml\ntask: firsts\ndoc_to_target: 0\n")
    evaluator = make_evaluator("lm_eval", {"tasks": {"val": "words", "test": "both"}, "include_path": "tasks"}, tmp_path)
    updated = evaluator.load(language_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    for scale in (1.0, -3.0):
        # After an update in place, as the search does it.
        for module in (updated, model):
            with torch.no_grad():
                module.get_parameter("lm_head.weight").mul_(scale)
        right = 0
        for row in rows:
            ids = [tokenizer(f"{row['question']} {c}", return_tensors="pt")["input_ids"] for c in row["choices"]]
            with torch.inference_mode():
                last = [model(i[:, :-1]).logits[0, -1].log_softmax(-1)[i[0, -1]].item() for i in ids]
            right += last.index(max(last)) == row["answer"]
        found = evaluator.score("val")
        assert found["words/acc"] == found["acc"] == pytest.approx(right / len(rows))
        assert set(found) == {"words/acc", "acc"}
        of_group = evaluator.score("test")
        assert of_group["words/acc"] == found["acc"]
        assert of_group["acc"] == of_group["both/acc"] == pytest.approx((of_group["words/acc"] + of_group["firsts/acc"]) / 2)
    wrong = make_evaluator("lm_eval", {"tasks": {"val": ["word", "words"], "test": "!"}, "include_path": "tasks"}, tmp_path)
    with pytest.raises(RequestError) as caught:
        wrong.load(language_model)
    assert caught.value.problems == (
        "search.evaluator.lm_eval.tasks.val: wanted a task of the harness, found 'word'. Fix: write `words`, or give "
        "`include_path`.",
        "search.evaluator.lm_eval.tasks.test: wanted a task of the harness, "
        "found '!'. Fix: check the name, or give `include_path`.",
    )


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        ("exit 3 {model}", "ended with code 3"),
        ("echo done {model}", "last line is not JSON"),
        ("true {model}", "printed nothing"),
        (f"echo {TOKEN} {{model}} >&2; false", r"^'echo \*\*\* .* ended with code 1: \*\*\* /"),
        (f"echo {{model}} {TOKEN}", r"^'echo .* \*\*\*': its last line is not JSON: .* \*\*\*$"),
    ],
)
def test_a_command_that_fails_says_how(language_model, tmp_path, run, complaint):
    evaluator = make_evaluator("command", {"run": run}, tmp_path)
    evaluator.load(language_model)
    with pytest.raises(RuntimeError, match=complaint):
        evaluator.score("val")


def problems_of(name: str, options: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """All that is wrong with a built-in evaluator of these options."""
    try:
        make_evaluator(name, options, folder)
    except RequestError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    ("name", "wrong", "complaint"),
    [
        ("causal_lm", {"data": None}, ".data: wanted a file for each split, found nothing"),
        ("causal_lm", {"data": "val.txt"}, ".data: wanted a file for each split, found 'val.txt'"),
        ("causal_lm", {"data": {"val": "none.txt"}}, ".data.val: wanted a file, found none at {folder}/none.txt. Fix:"),
        (
            "causal_lm",
            {"data": {"val": {"a": "val.txt", "b": "none.txt"}}},
            ".data.val.b: wanted a file, found none at {folder}/none.txt. Fix:",
        ),
        ("causal_lm", {"data": {"val": 3}}, ".data.val: wanted the path of a file, found 3"),
        ("causal_lm", {"data": {"val": {}}}, ".data.val: wanted a file, found nothing. Fix:"),
        ("causal_lm", {"data": {1: "val.txt"}}, ".data: wanted the name of a split, found 1"),
        ("causal_lm", {"lenght": 3}, ": unknown key 'lenght'. Fix: write `length`"),
        ("causal_lm", {"folder": "."}, ": unknown key 'folder'"),
        ("causal_lm", {"length": "512"}, ".length: wanted a whole number of at least 1, found '512'"),
        ("causal_lm", {"batch": 0}, ".batch: wanted a whole number of at least 1, found 0"),
        ("causal_lm", {"tokens": -1}, ".tokens: wanted a whole number of at least 1, found -1"),
        ("causal_lm", {"text": 3}, ".text: wanted text, found 3"),
        ("causal_lm", {"dtype": "cat"}, ".dtype: wanted auto | float32 | float16 | bfloat16, found 'cat'"),
        ("causal_lm", {"dtype": "int8"}, ".dtype: wanted auto | float32 | float16 | bfloat16, found 'int8'"),
        (
            "classification",
            {"dtype": "bf16"},
            ".dtype: wanted auto | float32 | float16 | bfloat16, found 'bf16'. Fix: write `bfloat16`",
        ),
        ("classification", {"label": ["y"]}, ".label: wanted text, found a value of type list"),
        ("lm_eval", {"tasks": {}}, ".tasks: wanted a task for each split"),
        ("lm_eval", {"tasks": {"val": []}}, ".tasks.val: wanted a task, found nothing. Fix:"),
        ("lm_eval", {"tasks": {"val": ["a", {"task": "b"}]}}, ".tasks.val: wanted the name of a task, found a value of type dict"),
        ("lm_eval", {"include_path": "nowhere"}, ".include_path: wanted a folder, found none at {folder}/nowhere. Fix:"),
        ("lm_eval", {"num_fewshot": 2.5}, ".num_fewshot: wanted a whole number of at least 0, found 2.5"),
        ("lm_eval", {"limit": 0}, ".limit: wanted a number above 0, found 0"),
        ("lm_eval", {"chat_template": "yes"}, ".chat_template: wanted true or false, found 'yes'"),
        ("command", {"run": None}, ".run: wanted a command with {model} in it, found nothing"),
        ("command", {"run": 5}, ".run: wanted a command with {model} in it, found 5"),
        ("command", {"run": "python eval.py {split}"}, ".run: wanted a command with {model} in it, found 'python eval.py {split}'"),
        ("command", {"timeout": "x"}, ".timeout: wanted a number above 0, found 'x'"),
        ("command", {"scratch": "val.txt"}, ".scratch: wanted a folder, found none at {folder}/val.txt. Fix:"),
    ],
)
def test_a_wrong_option_is_told_with_its_place_and_a_fix_when_the_evaluator_is_made(tmp_path, name, wrong, complaint):
    (tmp_path / "val.txt").write_text("x")
    [problem] = problems_of(name, OPTIONS[name] | wrong, tmp_path)
    assert problem.startswith(f"search.evaluator.{name}" + complaint.replace("{folder}", str(tmp_path)))
    assert "Fix: " in problem


@pytest.mark.parametrize("name", OPTIONS)
def test_all_wrong_options_are_told_at_once(tmp_path, name):
    told = problems_of(name, dict.fromkeys(OPTIONS[name], math.nan) | {"unknown": 1}, tmp_path)
    assert [problem.split(":")[0] for problem in told] == [
        f"search.evaluator.{name}",
        *(f"search.evaluator.{name}.{key}" for key in OPTIONS[name]),
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_with_nothing_after_it_is_the_default(tmp_path, name):
    (tmp_path / "val.txt").write_text("x")
    required = next(iter(OPTIONS[name]))
    options = dict.fromkeys(OPTIONS[name]) | {required: OPTIONS[name][required]}
    assert problems_of(name, options, tmp_path) == ()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_the_options_is_taken_or_refused_with_a_fix(data):
    name = data.draw(st.sampled_from(sorted(OPTIONS)))
    place = data.draw(st.sampled_from(places(OPTIONS[name])[1:]))
    told = problems_of(name, replaced(OPTIONS[name], place, data.draw(junk)), Path("nowhere"))
    assert all(problem.startswith(f"search.evaluator.{name}") and "Fix: " in problem for problem in told)


@pytest.mark.parametrize("name", ["causal_lm", "classification", "lm_eval"])
def test_a_split_without_data_is_told_before_anything_is_loaded(family, monkeypatch, name):
    made = family(2)
    (made.folder / "val.txt").write_text("x")
    key = "tasks" if name == "lm_eval" else "data"
    job = job_of(made, {name: {key: {"dev": "val.txt", "tests": "val.txt"}}}, "loss")
    monkeypatch.setattr(type(make_evaluator(name, job.search.options, made.folder)), "load", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(RequestError) as caught:
        Scorer(job)
    assert caught.value.problems == (
        "search.split.search: wanted a split that the evaluator has data for, found 'val'. Fix: use one of dev, tests, or give "
        "it such data.",
        "search.split.report: wanted a split that the evaluator has data for, found 'test'. Fix: write `tests`, or give it such "
        "data.",
    )


@pytest.mark.parametrize(
    ("splits", "refused"), [(["val", "test"], False), (["val"], True), ({"val": 1}, True), ([], False), ("val", False), (3, False)]
)
def test_an_evaluator_of_ones_own_may_say_which_splits_it_has(splits, refused):
    with pytest.raises(RequestError) if refused else contextlib.nullcontext():
        check_splits(SimpleNamespace(splits=splits), {"search.split.search": "val", "search.split.report": "test"})


def test_an_empty_text_is_told(language_model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(RequestError, match=r"wanted two tokens at least, found 0"):
        make_evaluator("causal_lm", {"data": {"val": "empty.txt"}}, tmp_path).load(language_model)
