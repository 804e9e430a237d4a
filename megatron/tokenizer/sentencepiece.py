"""SentencePiece models, with special tokens added behind their vocabulary."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron.config import UsageError
from megatron.tokenizer.base import Array

MODEL_FILE = "tokenizer.model"
SPECIAL_TOKENS_FILE = "special_tokens.json"
ADDED = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")


class SentencePieceTokenizer:
    """The pieces of a model, then the special tokens it lacks, numbered on in the order of registration.

    Text is cut at its leftmost special string (where two start at one place, the one registered first), and so on; what
    lies between is encoded by SentencePiece on its own. See `Tokenizer` for the attributes.
    """

    def __init__(self, model: bytes, special_tokens: Mapping[str, int], *, source: str = MODEL_FILE) -> None:
        self._model = model
        self._processor = _processor(model, source)
        pieces = self._processor.get_piece_size()
        self.special_tokens = dict(special_tokens)
        self._special_ids = {name: np.array([token_id], np.int32) for name, token_id in special_tokens.items()}
        self._special_names = {token_id: name for name, token_id in self.special_tokens.items()}
        added = sorted(token_id for token_id in self._special_names if token_id >= pieces)
        if added != list(range(pieces, pieces + len(added))):
            raise ValueError(f"{source}: special token ids {added} do not continue its {pieces} pieces")
        self.vocab_size = pieces + len(added)
        self.bos_id = self._own_or_added(self._processor.bos_id(), "<BOS>", None)
        self.eos_id = self._own_or_added(self._processor.eos_id(), "<EOS>", None)
        self.pad_id = self._own_or_added(self._processor.pad_id(), "<PAD>", self.eos_id)
        self.eod_id = self.special_tokens.get("<EOD>", self.eos_id)
        # An alternation tries its branches in order at each place, from left to right: exactly the rule.
        self._cut = re.compile("(" + ("|".join(map(re.escape, self.special_tokens)) or "(?!)") + ")")

    @classmethod
    def from_file(
        cls, path: Path, *, vocab_extra_ids: int = 0, extra_tokens: Iterable[str] = (), new_tokens: bool = True
    ) -> "SentencePieceTokenizer":
        """The model at `path` with the usual special tokens, `vocab_extra_ids` of `<extra_id_i>`, and `extra_tokens`.

        Without `new_tokens`, only special tokens that the model has already, and `extra_tokens`.

        Raises:
            UsageError: an empty name among `extra_tokens`.
            ValueError: the file is not a SentencePiece model.
        """
        model = path.read_bytes()
        return cls(
            model,
            _register(_processor(model, str(path)), vocab_extra_ids, extra_tokens, new_tokens),
            source=str(path),
        )

    @classmethod
    def load(cls, folder: Path) -> "SentencePieceTokenizer":
        """What `save` wrote into `folder`.

        Raises:
            OSError, ValueError: a file is missing or damaged.
        """
        path = folder / SPECIAL_TOKENS_FILE
        special_tokens = json.loads(path.read_text(encoding="utf-8")).get("special_tokens")
        if not isinstance(special_tokens, dict) or not all(isinstance(i, int) for i in special_tokens.values()):
            raise ValueError(f"{path} has no table of special_tokens")
        return cls((folder / MODEL_FILE).read_bytes(), special_tokens, source=str(folder / MODEL_FILE))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model` and `special_tokens.json`."""
        (folder / MODEL_FILE).write_bytes(self._model)
        table = {"tokenizer_type": "SentencePieceTokenizer", "special_tokens": self.special_tokens}
        (folder / SPECIAL_TOKENS_FILE).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it become their ids."""
        return self.encode_batch([text])[0]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it are ordinary text."""
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str], *, special: bool = True) -> list[Array]:
        """Ids of each text, int32; without `special`, special strings are ordinary text."""
        cuts = [self._cut.split(text) for text in texts] if special else [[text] for text in texts]
        # Texts share pieces, such as the newline behind a message: each is encoded once. Empty ones have no ids.
        pieces = dict.fromkeys(piece for parts in cuts for piece in parts[::2] if piece)
        encoded = self._processor.encode(list(pieces), return_type="numpy", num_threads=1) if pieces else []
        ids: dict[str, Array] = dict(zip(pieces, encoded, strict=True))
        runs = [
            [self._special_ids[part] if odd % 2 else ids[part] for odd, part in enumerate(parts) if part]
            for parts in cuts
        ]
        # One concatenation for all texts, then a view for each, is several times faster than one a text.
        ends = np.cumsum([sum(map(len, run)) for run in runs]).tolist()
        flat = np.concatenate([np.empty(0, np.int32), *chain.from_iterable(runs)])
        return [flat[start:end] for start, end in pairwise([0, *ends])]

    def special_strings_in(self, text: str) -> list[str]:
        """The special strings that `encode` would find in `text`, in order."""
        return self._cut.findall(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids become their strings."""
        parts: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in self._special_names:
                parts += [self._processor.decode(run), self._special_names[token_id]]
                run = []
            else:
                run.append(int(token_id))
        return "".join([*parts, self._processor.decode(run)])

    def _own_or_added(self, own: int, name: str, otherwise: int | None) -> int | None:
        return own if own >= 0 else self.special_tokens.get(name, otherwise)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all pieces and special tokens."""
        digest = hashlib.sha256()
        for index in range(self._processor.get_piece_size()):
            digest.update(self._processor.id_to_piece(index).encode() + b"\0")
        digest.update(json.dumps(self.special_tokens).encode())
        return digest.hexdigest()


def _processor(model: bytes, source: str) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{source} is not a SentencePiece model: {error}") from error


def _register(
    processor: SentencePieceProcessor, vocab_extra_ids: int, extra_tokens: Iterable[str], new_tokens: bool
) -> dict[str, int]:
    """Special string -> id, in the order of registration; a name that the model has keeps its id there."""
    size = processor.get_piece_size()
    own = [
        processor.id_to_piece(index) if index >= 0 else name
        for index, name in ((processor.pad_id(), "<PAD>"), (processor.bos_id(), "<BOS>"), (processor.eos_id(), "<EOS>"))
    ]
    usual = [*ADDED, *own, *(f"<extra_id_{index}>" for index in range(vocab_extra_ids))]
    explicit = list(extra_tokens)
    if "" in explicit:
        raise UsageError(f"--vocab_extra_ids_list {','.join(explicit)!r} has an empty name: remove the extra comma")
    special: dict[str, int] = {}
    for name in [*(name for name in usual if new_tokens or _has(processor, name)), *explicit]:
        if name not in special:
            special[name] = processor.piece_to_id(name) if _has(processor, name) else size
            size += special[name] == size
    return special


def _has(processor: SentencePieceProcessor, name: str) -> bool:
    """Whether `name` is a piece; an unknown one has the id of the unknown piece."""
    return bool(processor.id_to_piece(processor.piece_to_id(name)) == name)
