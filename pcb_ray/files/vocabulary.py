"""Vocabularies are compared token by token: rows of merged embeddings belong to ids, and ids to the base's tokens.

They are read from whatever files a tokenizer has, within bounds, and nothing of them is run.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.files.foreign import ANEW, mismatch, show, strict_json
from pcb_ray.files.quantised import parts_of

MAX_TOKENS = 1 << 24
_ADDED = "added_tokens.json"
_BESIDE = (_ADDED, "tokenizer_config.json")
# Tokens that nothing was trained on, kept for those who come after: `[unused7]`, `<|reserved_special_token_3|>`, `<extra_id_9>`.
_RESERVED = re.compile(
    r"[<\[|]+(?:reserved|unused|extra|special|dummy|placeholder|blank|control|madeupword|pad)[\w ]*\d[>\]|]+", re.IGNORECASE
)
_LONGEST_RESERVED = 64


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer by id."""

    where: str
    """The file that they were read from."""
    tokens: Mapping[int, str]
    special: Collection[int]
    """The ids of those that were added to what was learnt, or that control: not of text."""


# ---------------------------------------------------------------------------------------------------- comparing


class Compared(NamedTuple):
    """How another vocabulary stands to the base's."""

    moved: list[str]
    """Tokens of both that have other ids."""
    replaced: list[str]
    """Texts that stand at ids where the base has another token, which is not a reserved one."""
    renamed: list[str]
    """The same for reserved tokens of the base: the row is free to mean something else."""
    more: list[int]
    """Ids that the base does not use."""
    missing: list[str]
    """Tokens of the base that the other has not."""
    kinds: list[str]
    """Tokens that are special for one of the two only."""


def compare(base: Vocabulary, other: Vocabulary) -> Compared:
    """Compare them token by token: text, id, and whether it is special."""
    ids_of_base = {text: number for number, text in base.tokens.items()}
    ids_of_other = {text: number for number, text in other.tokens.items()}
    found = Compared([], [], [], [], [], [])
    for number, text in other.tokens.items():
        before = base.tokens.get(number)
        if before == text:
            if (number in base.special) != (number in other.special):
                found.kinds.append(show(text))
        elif text in ids_of_base:
            found.moved.append(f"{show(text)} ({ids_of_base[text]} in the base, {number} here)")
        elif before is None:
            found.more.append(number)
        else:
            (found.renamed if _is_reserved(before) else found.replaced).append(f"{number}: {show(before)} is {show(text)} here")
    found.missing.extend(
        show(text) for text, number in ids_of_base.items() if text not in ids_of_other and number not in other.tokens
    )
    return found


def check_vocabularies(base: Checkpoint, models: Sequence[Checkpoint], tokenizer: Checkpoint, notes: list[str]) -> list[str]:
    """What is wrong with the tokenizer that the output gets. `notes` are told where it, or that of a model, is another than the
    base's and can be taken all the same. Raises RequestError for files that are no vocabulary."""
    problems: list[str] = []
    others = {id(one): one for one in (tokenizer, *models) if one is not base}
    for other in others.values():
        pair, why = _pair(base, other)
        if pair is None:
            if why:
                notes.append(f"{other.source}: its vocabulary can't be held against the base's: {why}")
            continue
        theirs, found = pair[1], compare(*pair)
        rows = next((part["vocab_size"] for part in parts_of(base.config) if type(part.get("vocab_size")) is int), None)
        if theirs.where in _BESIDE:  # of the tokens in these files no one must list all
            found = found._replace(more=[number for number in found.more if rows is not None and number >= rows], missing=[])
        beyond = [str(number) for number in found.more if rows is not None and number >= rows]
        differences = [
            (found.moved, "tokens at other ids"),
            (found.replaced, "ids with other tokens"),
            (beyond, f"ids beyond the {rows} rows of the base's embedding"),
        ]
        for listed, what in differences:
            if listed and other is tokenizer:
                found_there = f"{len(listed)} {what} in {theirs.where} of {other.source} ({_some(listed)})"
                fix = "write `tokenizer_source: base`, or merge models that share its vocabulary"
                problems.append(f"tokenizer_source: {mismatch('the tokens of the base at their ids', found_there, fix)}")
            elif listed:
                notes.append(
                    f"{other.source}: its tokenizer has {len(listed)} {what} ({_some(listed)}); embeddings are merged by id"
                )
        for listed, what in (
            (found.renamed, "reserved tokens of the base have another text"),
            ([str(number) for number in found.more], "ids are used that the base leaves free"),
            (found.missing, "tokens of the base are missing"),
            (found.kinds, "tokens are special in one of the two alone"),
        ):
            if listed:
                notes.append(f"{other.source}: in its tokenizer {len(listed)} {what} ({_some(listed)})")
    return problems


def _pair(base: Checkpoint, other: Checkpoint) -> tuple[tuple[Vocabulary, Vocabulary] | None, str]:
    """The two vocabularies; None where they are the same, or (then with the reason) where they can't be compared.

    What can be compared is read from files of one format, or of two that have the tokens of the model as texts. Where the
    vocabularies themselves are the same file, what is added to them is compared."""
    ours, theirs = ([p for p in _READERS if _file_of(one, p)] for one in (base, other))
    if not ours or not theirs:
        return None, ""
    shared = [pattern for pattern in ours if pattern in theirs]
    texts = [[pattern for pattern in formats if pattern in _TEXTS] for formats in (ours, theirs)]
    if not shared and not all(texts):
        return None, "they are in files of other kinds"
    first, second = (shared[0], shared[0]) if shared else (texts[0][0], texts[1][0])
    is_same = first == second and _are_same(base, other, (_file_of(base, first), _file_of(other, second)))
    if is_same and (_READERS[first] is _tokenizer_json or _are_same(base, other, _BESIDE)):
        return None, ""
    try:
        if is_same:
            return (_added_to(base), _added_to(other)), ""
        return (_read(base, first), _read(other, second)), ""
    except RequestError as error:
        return None, str(error).partition(" Fix: ")[0]


def _file_of(one: Checkpoint, pattern: str) -> str:
    return min((file.name for file in one.own if re.fullmatch(pattern, file.name)), default="")


def _are_same(base: Checkpoint, other: Checkpoint, names: Collection[str]) -> bool:
    """Whether files of these names are the same in both, as far as can be told without fetching them from the Hub."""
    sizes = [{file.name: file.size for file in one.own if file.name in names} for one in (base, other)]
    if sizes[0] != sizes[1]:
        return False
    on_disk = base.folder is not None and other.folder is not None
    return not on_disk or all(base.read(name) == other.read(name) for name in sizes[0])


def _some(listed: Sequence[str]) -> str:
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")


def _is_reserved(text: str) -> bool:
    return len(text) <= _LONGEST_RESERVED and _RESERVED.fullmatch(text) is not None


# ---------------------------------------------------------------------------------------------------- reading


def _read(one: Checkpoint, pattern: str) -> Vocabulary:
    """The vocabulary of a model in one format. Raises RequestError for a file that is not what its name says."""
    name = _file_of(one, pattern)
    place, reader = f"{one.source}/{name}", _READERS[pattern]
    with _told(place):
        tokens, special = reader(place, one.read(name))
    if reader is not _tokenizer_json:  # which says all by itself
        added = _added_to(one).tokens
        tokens, special = {**tokens, **added}, {*special, *added}
    if not tokens or not 0 <= min(tokens) <= max(tokens) < MAX_TOKENS:
        raise RequestError(f"{place}: {mismatch(f'tokens with ids from 0 to {MAX_TOKENS}', 'none, or others', ANEW)}")
    return Vocabulary(name, tokens, frozenset(special))


def _added_to(one: Checkpoint) -> Vocabulary:
    """The tokens that files beside a vocabulary add to it. Raises RequestError."""
    tokens: dict[int, str] = {}
    for beside in _BESIDE:
        if any(file.name == beside for file in one.own):
            place = f"{one.source}/{beside}"
            with _told(place):
                tokens |= _added(place, one.read(beside))
    return Vocabulary(_BESIDE[-1], tokens, frozenset(tokens))


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    """Whatever a file that is no vocabulary leads to is told as that."""
    try:
        yield
    except RequestError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise RequestError(f"{place}: {mismatch('a vocabulary', f'something else ({show(str(error))})', ANEW)}") from None


Tokens = tuple[dict[int, str], set[int]]


def _tokenizer_json(place: str, raw: bytes) -> Tokens:
    content = strict_json(place, raw)
    model = content["model"]
    vocab = model["vocab"]
    tokens = _by_id(vocab) if isinstance(vocab, dict) else {number: _text(entry[0]) for number, entry in enumerate(vocab)}
    added = {_id(one["id"]): _text(one["content"]) for one in content.get("added_tokens") or []}
    return tokens | added, set(added)


def _vocab_json(place: str, raw: bytes) -> Tokens:
    return _by_id(strict_json(place, raw)), set()


def _vocab_txt(_place: str, raw: bytes) -> Tokens:
    return dict(enumerate(line.rstrip("\r") for line in raw.decode().removesuffix("\n").split("\n"))), set()


def _sentencepiece(_place: str, raw: bytes) -> Tokens:
    model = _sentencepiece_model()()
    try:
        model.ParseFromString(raw)
    except Exception as error:  # protobuf's own
        raise ValueError(str(error)) from None
    normal, byte = 1, 6
    pieces = list(model.pieces)
    return (
        {number: one.piece.decode() for number, one in enumerate(pieces)},
        {number for number, one in enumerate(pieces) if one.type not in (normal, byte)},
    )


def _tiktoken(_place: str, raw: bytes) -> Tokens:
    tokens = {}
    for line in raw.decode("ascii").splitlines():
        if line:
            token, rank = line.split()
            tokens[int(rank)] = base64.b64decode(token, validate=True).hex()
    return tokens, set()


def _tekken(place: str, raw: bytes) -> Tokens:
    content = strict_json(place, raw)
    special = content.get("special_tokens") or []
    first = _id(content["config"]["default_num_special_tokens"])
    size = _id(content["config"]["default_vocab_size"])
    tokens = {_id(one["rank"]): _text(one["token_str"]) for one in special}
    learnt = {first + _id(one["rank"]): base64.b64decode(one["token_bytes"], validate=True).hex() for one in content["vocab"]}
    return tokens | {number: token for number, token in learnt.items() if number < size}, set(tokens)


def _added(place: str, raw: bytes) -> dict[int, str]:
    """The tokens that a file beside the vocabulary adds to it: `{text: id}`, or the decoder in a tokenizer's config."""
    content = strict_json(place, raw, constants=True)
    if place.endswith(_ADDED):
        return _by_id(content)
    return {int(number): _text(one["content"]) for number, one in (content.get("added_tokens_decoder") or {}).items()}


def _by_id(table: Mapping[str, Any]) -> dict[int, str]:
    found = {_id(number): text for text, number in table.items()}
    if len(found) < len(table):
        raise ValueError("an id with several tokens")
    return found


def _id(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{show(value)} in the place of an id")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{show(value)} in the place of a token")
    return value


@functools.cache
def _sentencepiece_model() -> Any:
    """The part of sentencepiece's ModelProto that says which pieces there are."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="pieces.proto", package="pcb_ray", syntax="proto2")
    piece = file.message_type.add(name="Piece")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, (name, kind) in enumerate(
        (("piece", kinds.TYPE_BYTES), ("score", kinds.TYPE_FLOAT), ("type", kinds.TYPE_INT32)), 1
    ):
        field = piece.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
        if name == "type":
            field.default_value = "1"
    model = file.message_type.add(name="Model")
    model.field.add(name="pieces", number=1, type=kinds.TYPE_MESSAGE, type_name=".pcb_ray.Piece", label=kinds.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pcb_ray.Model"))


_READERS: Mapping[str, Callable[[str, bytes], Tokens]] = {
    r"tokenizer\.json": _tokenizer_json,
    r"vocab\.json": _vocab_json,
    r"vocab\.txt": _vocab_txt,
    r"[^/]*\.model": _sentencepiece,
    r"tekken\.json": _tekken,
    r"[^/]*\.tiktoken": _tiktoken,
}
# Of a sentencepiece model the ids are not always those of the model: some shift them.
_TEXTS = tuple(_READERS)[:3]
