"""Tokenizers of the `tokenizers` library, from the description that a tokenizer.json is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron.tokenizer.base import Array
from megatron.tokenizer.description import read_description, read_special_tokens, write_description
from megatron.tokenizer.special import SpecialStrings, extra_ids, fingerprint, placed, register

TOKENIZER_FILE = "tokenizer.json"
ROLES = ("bos", "eos", "pad", "eod")


class HFTokenizer:
    """A tokenizer.json, with special tokens added behind its vocabulary.

    Text is cut at special strings as `SpecialStrings` says; what lies between is encoded by the library on its own,
    without what its post-processor would add, such as a BOS. See `Tokenizer` for the attributes.
    """

    chat_template: str | None = None

    def __init__(
        self,
        model: str,
        special_tokens: Mapping[str, int],
        ids: Mapping[str, int | None],
        tokenizer_type: str = "HFTokenizer",
        source: str = TOKENIZER_FILE,
    ) -> None:
        """From a tokenizer.json that has all `special_tokens`, and the id of each of `ROLES`, if it has one.

        Raises:
            ValueError: `model`, read from `source`, is not such a description.
        """
        self._model, self._ids, self.tokenizer_type = model, dict(ids), tokenizer_type
        head = read_model(model, source)
        wrong = [name for name, token_id in special_tokens.items() if head.token_to_id(name) != token_id]
        if wrong:
            raise ValueError(f"{source}: special token {wrong[0]!r} does not have the id {special_tokens[wrong[0]]}")
        content = json.loads(model)
        self._special = SpecialStrings(special_tokens, **_manners(content, special_tokens))
        self.special_tokens = self._special.ids
        self._vocabulary = head.get_vocab()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id, self.eod_id = (self._ids.get(role) for role in ROLES)
        behind = _behind_special(content)
        self._head = head
        self._behind = read_model(json.dumps(behind), source) if behind else head
        for tokenizer in (self._head, self._behind):
            tokenizer.encode_special_tokens = True  # in the library's words: special strings are encoded as text

    @classmethod
    def from_model(
        cls,
        model: FastTokenizer,
        names: Mapping[str, str | None],
        *,
        vocab_extra_ids: int = 0,
        extra_tokens: Iterable[str] = (),
        new_tokens: bool = True,
        tokenizer_type: str = "HFTokenizer",
        source: str = TOKENIZER_FILE,
    ) -> "HFTokenizer":
        """The library's tokenizer `model`, with more special tokens, in this order: those `names` has for `ROLES`,
        `vocab_extra_ids` of `<extra_id_i>`, and `extra_tokens`.

        Without `new_tokens`, only those that the vocabulary has already, and `extra_tokens`.

        Raises:
            UsageError: an empty name among `extra_tokens`.
            ValueError: the ids of the vocabulary have gaps, so that nothing can be added behind it.
        """
        own = [token["content"] for token in json.loads(model.to_str())["added_tokens"] if token["special"]]
        named = [name for role in ROLES if (name := names.get(role)) is not None]
        special = register(
            [*own, *named, *extra_ids(vocab_extra_ids)],
            extra_tokens,
            new_tokens=new_tokens,
            known=model.token_to_id,
            size=max(model.get_vocab().values(), default=-1) + 1,
        )
        model.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in special if name not in own]
        )
        wrong = [name for name, token_id in special.items() if model.token_to_id(name) != token_id]
        if wrong:
            raise ValueError(f"{source}: its ids have gaps, so that {wrong[0]!r} cannot be added behind the last")
        ids = {role: special.get(name) if (name := names.get(role)) is not None else None for role in ROLES}
        return cls(_settled(model), special, ids, tokenizer_type, source)

    @classmethod
    def load(cls, folder: Path) -> "HFTokenizer":
        """What `save` wrote into `folder`.

        Raises:
            OSError, ValueError: a file is missing or damaged.
        """
        description, path = read_description(folder), folder / TOKENIZER_FILE
        ids = {role: description.get(f"{role}_id") for role in ROLES}
        text = path.read_text(encoding="utf-8")
        return cls(text, read_special_tokens(folder), ids, description["tokenizer_type"], str(path))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, which has the added tokens, and `special_tokens.json`."""
        (folder / TOKENIZER_FILE).write_text(self._model, encoding="utf-8")
        write_description(self, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as what it was made of: the library forgets its settings on the way."""
        return type(self), (self._model, self.special_tokens, self._ids, self.tokenizer_type)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it become their ids."""
        return self.encode_batch([text])[0]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it are ordinary text."""
        return _encode(self._head, [text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str], *, special: bool = True) -> list[Array]:
        """Ids of each text, int32; without `special`, special strings are ordinary text, and each text is taken as one
        that follows a special string, as the body of a message does.
        """
        if not special:
            return _encode(self._behind, texts)
        return self._special.encode(
            texts, lambda pieces: _encode(self._head, pieces), lambda pieces: _encode(self._behind, pieces)
        )

    def encode_offsets(self, texts: Sequence[str]) -> list[Array]:
        """Ids of each text, and where each token begins and ends, int32 [n, 3]; see `Tokenizer`."""
        return self._special.encode_offsets(
            texts,
            lambda pieces: _encode_offsets(self._head, pieces),
            lambda pieces: _encode_offsets(self._behind, pieces),
        )

    def hide_special(self, text: str) -> str:
        """Make the special strings in `text` ordinary for `encode_offsets`; see `Tokenizer`."""
        return self._special.hide(text)

    def special_strings_in(self, text: str) -> list[str]:
        """The special strings that `encode` would find in `text`, in order."""
        return self._special.find(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids become their strings."""
        return self._special.decode(ids, lambda run: _decode(self._head, run), lambda run: _decode(self._behind, run))

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all pieces and special tokens."""
        pieces = [""] * self.vocab_size
        for piece, token_id in self._vocabulary.items():
            pieces[token_id] = piece
        return fingerprint(pieces, self.special_tokens)


def read_model(text: str, source: str) -> FastTokenizer:
    """The library's tokenizer that `text` describes.

    Raises:
        ValueError: `text`, read from `source`, is no tokenizer.json, or gives an added token an id that the library
            would not: it numbers them on behind the vocabulary.
    """
    try:
        model = FastTokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{source} is not a tokenizer.json: {error}") from error
    for token in json.loads(text).get("added_tokens") or ():
        if model.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"{source}: the added token {token['content']!r} cannot have the id {token['id']}")
    return model


def _settled(model: FastTokenizer) -> str:
    """The description of `model` without what would make the ids depend on more than the text between special strings.

    Those are found in the text as it is, before it is normalized; nothing is cut off, padded, or merged at random.
    """
    content = json.loads(model.to_str())
    content |= {"truncation": None, "padding": None}
    if "dropout" in content["model"]:
        content["model"]["dropout"] = None
    for token in content["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    return json.dumps(content, ensure_ascii=False)


def _manners(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, set[str]]:
    """How the description's special tokens treat the text around them, as `SpecialStrings` takes it."""
    flags = {"take_spaces_before": "lstrip", "take_spaces_behind": "rstrip", "whole_words": "single_word"}
    tokens = {token["content"]: token for token in content["added_tokens"]}
    return {key: {name for name in names if tokens.get(name, {}).get(flag)} for key, flag in flags.items()}


def _behind_special(content: dict[str, Any]) -> dict[str, Any] | None:
    """The description for text behind a special string, where that is encoded in another way than at the beginning: a
    space is put in front of the first word only, and only from there removed.
    """

    def changed(part: Any, **changes: dict[str, Any]) -> Any:
        if isinstance(part, list):
            return [changed(one, **changes) for one in part]
        if not isinstance(part, dict):
            return part
        return {key: changed(one, **changes) for key, one in part.items()} | changes.get(part.get("type", ""), {})

    if '"prepend_scheme": "first"' not in json.dumps(content["pre_tokenizer"]):
        return None
    never = {"prepend_scheme": "never"}
    return {
        **content,
        "pre_tokenizer": changed(content["pre_tokenizer"], Metaspace=never),
        "decoder": changed(content["decoder"], Metaspace=never, Strip={"start": 0}),
    }


def _encode(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[Array]:
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _encode_offsets(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[Array]:
    return [placed(one.ids, one.offsets) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _decode(tokenizer: FastTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)
