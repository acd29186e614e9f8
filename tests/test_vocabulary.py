"""Vocabularies are compared token by token, from whatever files a tokenizer has; tokens at other ids are never taken silently."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import struct
from pathlib import Path

import families
import pytest
from families import Family, merged_to
from junk import mutate_bytes, mutate_json

from pcb_ray import Recipe, RequestError
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.vocabulary import Vocabulary, _read, compare
from pcb_ray.planning import open_inputs, plan_of

WORDS = ["a", "b", "▁the", "é", "<s>"]

# --- the files of tokenizers ------------------------------------------------------------------------------------------------------


def piece(text: str, kind: int) -> bytes:
    """A message of sentencepiece's: 1 the text, 2 a score, 3 the kind; written by the rules of the wire format."""
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", -1.5) + (b"" if kind == 1 else b"\x18" + bytes([kind]))
    return b"\x0a" + bytes([len(body)]) + body


def tokenizer_json(tokens: list[str], added: dict[str, int]) -> bytes:
    content = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {text: k for k, text in enumerate(tokens)}, "merges": []},
        "added_tokens": [{"id": number, "content": text, "special": True} for text, number in added.items()],
    }
    return json.dumps(content).encode()


def unigram_json(tokens: list[str], added: dict[str, int]) -> bytes:
    content = json.loads(tokenizer_json(tokens, added))
    content["model"] = {"type": "Unigram", "vocab": [[text, -1.0] for text in tokens]}
    return json.dumps(content).encode()


def decoder(added: dict[str, int]) -> bytes:
    return json.dumps({"added_tokens_decoder": {str(number): {"content": text} for text, number in added.items()}}).encode()


def tekken(tokens: list[str], added: dict[str, int]) -> bytes:
    vocab = [{"rank": k, "token_bytes": base64.b64encode(text.encode()).decode()} for k, text in enumerate(tokens)]
    special = [{"rank": number, "token_str": text, "is_control": True} for text, number in added.items()]
    config = {"default_num_special_tokens": 10, "default_vocab_size": 100}
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special}).encode()


def files_of(kind: str, tokens: list[str], added: dict[str, int]) -> dict[str, bytes]:
    """A tokenizer of these tokens, at the ids of their places, and of these added ones."""
    if kind == "tokenizer.json":
        return {kind: tokenizer_json(tokens, added), "tokenizer_config.json": b'{"added_tokens_decoder": {"0": {"content": "x"}}}'}
    if kind == "unigram":
        return {"tokenizer.json": unigram_json(tokens, added)}
    if kind == "vocab.json":
        table = {text: k for k, text in enumerate(tokens)}
        return {kind: json.dumps(table).encode(), "added_tokens.json": json.dumps(added).encode()}
    if kind == "vocab.txt":
        return {kind: ("\n".join(tokens) + "\n").encode(), "tokenizer_config.json": decoder(added)}
    if kind == "spm.model":
        return {kind: b"".join(piece(text, 1) for text in tokens) + b"\x12\x00", "tokenizer_config.json": decoder(added)}
    if kind == "tekken.json":
        return {kind: tekken(tokens, added)}
    lines = (f"{base64.b64encode(text.encode()).decode()} {k}" for k, text in enumerate(tokens))
    return {"qwen.tiktoken": "\n".join(lines).encode(), "tokenizer_config.json": decoder(added)}


KINDS = ("tokenizer.json", "unigram", "vocab.json", "vocab.txt", "spm.model", "tekken.json", "tiktoken")
TEXTS = KINDS[:4]


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def family_of(folder: Path, base: dict[str, bytes], other: dict[str, bytes], rows: int = 100) -> Family:
    """A base, model0 with the base's tokenizer, model1 with the other."""
    one = Family(folder, *families.fine_tuned(2), config={**families.CONFIG, "vocab_size": rows})
    for name, files in (("base", base), ("model0", base), ("model1", other)):
        put(one.folder / name, files)
    return one


def told(one: Family, source: str = "model1") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a plan with the tokenizer of model1 says: problems and notes."""
    asked = {"tokenizer_source": str(one.folder / source)} if source != "base" else {}
    recipe = Recipe.from_dict(one.recipe(merge_method="task_arithmetic", **asked))
    try:
        return (), plan_of(recipe, open_inputs(recipe)).notes
    except RequestError as error:
        return tuple(error.problems), ()


# --- what fits and what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_at_other_ids_are_refused_for_the_output_and_noted_for_a_model(tmp_path: Path, kind: str) -> None:
    added = {"<x>": 20, "<y>": 21}
    moved = files_of(kind, [WORDS[1], WORDS[0], *WORDS[2:]], added)
    one = family_of(tmp_path, files_of(kind, WORDS, added), moved)
    ((problem,), _) = told(one)
    assert "tokenizer_source: wanted the tokens of the base at their ids, found 2 tokens at other ids in" in problem
    assert "Fix: write `tokenizer_source: base`" in problem
    with pytest.raises(RequestError) as caught:
        merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(tokenizer_source=str(one.folder / "model1"))))
    assert caught.value.problems == [problem] or tuple(caught.value.problems) == (problem,), "plan and merge say the same"
    (note,) = told(one, "base")[1]
    assert "/model1: its tokenizer has 2 tokens at other ids (" in note


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_tokens_with_other_texts_at_the_same_ids_fit_with_a_note_that_names_them(tmp_path: Path, kind: str) -> None:
    chat = {"<|im_start|>": 20, "<|im_end|>": 21}
    one = family_of(tmp_path, files_of(kind, WORDS, {"<|reserved_0|>": 20, "<|reserved_1|>": 21}), files_of(kind, WORDS, chat))
    problems, (note,) = told(one)
    assert problems == ()
    assert "2 reserved tokens of the base have another text (20: '<|reserved_0|>' is '<|im_start|>' here, 21: " in note


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_that_has_another_learnt_token_is_refused(tmp_path: Path, kind: str) -> None:
    one = family_of(tmp_path, files_of(kind, WORDS, {"<x>": 20}), files_of(kind, ["c", *WORDS[1:]], {"<x>": 20}))
    ((problem,), _) = told(one)
    assert "found 1 ids with other tokens in" in problem


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("other", TEXTS)
def test_the_same_tokens_in_other_files_are_the_same(tmp_path: Path, kind: str, other: str) -> None:
    one = family_of(tmp_path, files_of(kind, WORDS, {"<x>": 20}), files_of(other, WORDS, {"<x>": 20}))
    assert told(one) == ((), ())
    put(one.folder / "model1", files_of(other, [WORDS[1], WORDS[0], *WORDS[2:]], {"<x>": 20}))
    assert "tokens at other ids" in told(one)[0][0]


def test_tokens_that_are_more_need_rows_of_the_embedding(tmp_path: Path) -> None:
    base, other = (files_of("tokenizer.json", WORDS, added) for added in ({"<x>": 20}, {"<x>": 20, "<y>": 21}))
    assert "1 ids are used that the base leaves free (21)" in told(family_of(tmp_path / "a", base, other, rows=22))[1][0]
    ((problem,), _) = told(family_of(tmp_path / "b", base, other, rows=21))
    assert "found 1 ids beyond the 21 rows of the base's embedding in" in problem
    assert "1 tokens of the base are missing ('<y>')" in told(family_of(tmp_path / "c", other, base))[1][0]


def test_a_token_that_is_special_for_one_alone_is_noted(tmp_path: Path) -> None:
    base, other = files_of("tokenizer.json", WORDS, {"<s>": 4}), files_of("tokenizer.json", WORDS, {})
    assert "1 tokens are special in one of the two alone ('<s>')" in told(family_of(tmp_path, base, other))[1][0]


def test_what_can_not_be_compared_is_noted(tmp_path: Path) -> None:
    one = family_of(tmp_path, files_of("vocab.json", WORDS, {}), files_of("tiktoken", WORDS, {}))
    assert "can't be held against the base's: they are in files of other kinds" in told(one)[1][0]


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs", b"[]", b'{"model": {"vocab": {"a": 0, "b": 0}}}', b"{}", b'{"model": null}']
)
@pytest.mark.parametrize("source", ["base", "model1"])
def test_a_vocabulary_that_can_not_be_read_is_noted_and_stops_nothing(tmp_path: Path, content: bytes, source: str) -> None:
    one = family_of(tmp_path, files_of("tokenizer.json", WORDS, {}), {"tokenizer.json": content})
    problems, (note,) = told(one, source)
    assert problems == ()
    assert "/model1: its vocabulary can't be held against the base's: " in note


@pytest.mark.parametrize("config", [b"[]", b'{"added_tokens_decoder": [1]}', b'{"added_tokens_decoder": {"x": {}}}', b"{"])
def test_odd_files_beside_a_vocabulary_stop_nothing(tmp_path: Path, config: bytes) -> None:
    one = family_of(
        tmp_path, files_of("vocab.txt", WORDS, {}), files_of("vocab.txt", WORDS, {}) | {"tokenizer_config.json": config}
    )
    assert told(one)[0] == ()


def test_of_the_same_vocabulary_file_only_what_is_added_is_compared(tmp_path: Path) -> None:
    """Sentencepiece ids that a tokenizer shifts, or texts that stand twice, are no difference from themselves."""
    twice = [*WORDS, WORDS[0]]
    base, other = files_of("vocab.txt", twice, {"<x>": 20}), files_of("vocab.txt", twice, {"<x>": 20, "<y>": 21})
    assert told(family_of(tmp_path / "a", base, other)) == ((), ())
    assert "found 1 ids beyond the 21 rows" in told(family_of(tmp_path / "b", base, other, rows=21))[0][0]
    shifted = {"spm.model": files_of("spm.model", WORDS, {})["spm.model"]}
    both = family_of(tmp_path / "c", shifted, shifted | {"tokenizer_config.json": decoder({"a": 1, "b": 2})})
    assert told(both) == ((), ())


def test_a_token_with_a_meaning_is_not_replaced_though_it_is_special(tmp_path: Path) -> None:
    base, other = files_of("tokenizer.json", WORDS, {"</s>": 20}), files_of("tokenizer.json", WORDS, {"banana": 20})
    assert "found 1 ids with other tokens in" in told(family_of(tmp_path, base, other))[0][0]


def test_a_long_token_is_looked_at_quickly(tmp_path: Path) -> None:
    base, other = Vocabulary("a", {5: "<reserved" + "1" * 1_000_000}, ()), Vocabulary("b", {5: "x"}, ())
    assert len(compare(base, other).replaced) == 1


def test_the_order_of_added_tokens_and_of_keys_does_not_matter(tmp_path: Path) -> None:
    first, second = {"<x>": 20, "<y>": 21}, {"<y>": 21, "<x>": 20}
    one = family_of(tmp_path, files_of("tokenizer.json", WORDS, first), files_of("tokenizer.json", WORDS, second))
    assert told(one) == ((), ())


@pytest.mark.parametrize("text", ["[unused7]", "<unused99>", "<|reserved_special_token_3|>", "<extra_id_9>", "<|extra_12|>"])
def test_tokens_that_nothing_was_trained_on_are_known_by_their_texts(text: str) -> None:
    base, other = Vocabulary("a", {5: text, 6: "w"}, ()), Vocabulary("b", {5: "<new>", 6: "v"}, ())
    found = compare(base, other)
    assert (len(found.renamed), len(found.replaced), found.moved) == (1, 1, [])


# --- files of any content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.very_slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(tmp_path: Path, kind: str, mutants: int) -> None:
    rng = random.Random(mutants + len(kind))
    Family(tmp_path, *families.fine_tuned(0))
    right = files_of(kind, WORDS, {"<x>": 20})
    name = next(iter(right))
    put(tmp_path / "base", right)
    read = 0
    for number in range(mutants):
        raw = right[name]
        if name.endswith(".json") and number % 2:
            raw = json.dumps(mutate_json(rng, mutate_json(rng, json.loads(raw)))).encode()
        else:
            raw = mutate_bytes(rng, raw, raw)
        (tmp_path / "base" / name).write_bytes(raw)
        checkpoint = open_checkpoint(str(tmp_path / "base"))
        for pattern in PATTERNS[kind]:
            with contextlib.suppress(RequestError):
                found = _read(checkpoint, pattern)
                assert all(isinstance(text, str) and type(k) is int and k >= 0 for k, text in found.tokens.items())
                read += 1
    assert mutants / 50 < read < mutants


PATTERNS = {
    "tokenizer.json": [r"tokenizer\.json"],
    "unigram": [r"tokenizer\.json"],
    "vocab.json": [r"vocab\.json"],
    "vocab.txt": [r"vocab\.txt"],
    "spm.model": [r"[^/]*\.model"],
    "tekken.json": [r"tekken\.json"],
    "tiktoken": [r"[^/]*\.tiktoken"],
}
