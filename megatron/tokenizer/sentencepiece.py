"""SentencePiece models, with special tokens added behind their vocabulary."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron.tokenizer.base import Array
from megatron.tokenizer.description import SPECIAL_TOKENS_FILE as SPECIAL_TOKENS_FILE
from megatron.tokenizer.description import read_special_tokens, write_description
from megatron.tokenizer.special import SpecialStrings, extra_ids, fingerprint, placed, register
from megatron.tokenizer.words import SPACE, PlacedWordMemo, WordMemo, words_are_apart

MODEL_FILE = "tokenizer.model"
ADDED = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")


class SentencePieceTokenizer:
    """The pieces of a model, then the special tokens it lacks, numbered on in the order of registration.

    Text is cut at special strings as `SpecialStrings` says; what lies between is encoded by SentencePiece on its own.
    See `Tokenizer` for the attributes.
    """

    tokenizer_type = "SentencePieceTokenizer"
    chat_template: str | None = None

    def __init__(self, model: bytes, special_tokens: Mapping[str, int], *, source: str = MODEL_FILE) -> None:
        self._model = model
        self._processor = _processor(model, source)
        pieces = self._processor.get_piece_size()
        self._special = SpecialStrings(special_tokens)
        self.special_tokens = self._special.ids
        added = sorted(token_id for token_id in self._special.names if token_id >= pieces)
        if added != list(range(pieces, pieces + len(added))):
            raise ValueError(f"{source}: special token ids {added} do not continue its {pieces} pieces")
        self.vocab_size = pieces + len(added)
        self.bos_id = self._own_or_added(self._processor.bos_id(), "<BOS>", None)
        self.eos_id = self._own_or_added(self._processor.eos_id(), "<EOS>", None)
        self.pad_id = self._own_or_added(self._processor.pad_id(), "<PAD>", self.eos_id)
        self.eod_id = self.special_tokens.get("<EOD>", self.eos_id)

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
        special_tokens = read_special_tokens(folder)
        return cls((folder / MODEL_FILE).read_bytes(), special_tokens, source=str(folder / MODEL_FILE))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model` and `special_tokens.json`."""
        (folder / MODEL_FILE).write_bytes(self._model)
        write_description(self, folder)

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
        return self._special.encode(texts, self._encode_pieces) if special else self._encode_pieces(texts)

    def _encode_pieces(self, texts: Sequence[str]) -> list[Array]:
        return self._words.encode(texts) if self._words else self._encode_whole(texts)

    def _encode_whole(self, texts: Sequence[str]) -> list[Array]:
        arrays: list[Array] = self._processor.encode(list(texts), return_type="numpy", num_threads=1) if texts else []
        return arrays

    def encode_offsets(self, texts: Sequence[str]) -> list[Array]:
        """Ids of each text, and where each token begins and ends, int32 [n, 3]; see `Tokenizer`."""
        return self._special.encode_offsets(texts, self._encode_pieces_offsets)

    def _encode_pieces_offsets(self, texts: Sequence[str]) -> list[Array]:
        if self._placed_words:
            return [rows.reshape(-1, 3) for rows in self._placed_words.encode(texts)]
        return self._encode_whole_offsets(texts)

    def _encode_whole_offsets(self, texts: Sequence[str]) -> list[Array]:
        encoded = self._processor.encode(list(texts), return_type="offset_mapping", num_threads=1)
        return [placed(one["ids"], one["offsets"]) for one in encoded]

    @cached_property
    def _mark(self) -> int | None:
        """The id of the space mark, if words can be encoded one by one."""
        return self._processor.piece_to_id(SPACE) if words_are_apart(self._model) else None

    @cached_property
    def _words(self) -> WordMemo | None:
        return None if self._mark is None else WordMemo(self._encode_whole, np.array([self._mark], np.int32))

    @cached_property
    def _placed_words(self) -> PlacedWordMemo | None:
        mark = None if self._mark is None else np.array([self._mark, 0, 0], np.int32)
        return None if mark is None else PlacedWordMemo(self._encode_whole_offsets, mark)

    def hide_special(self, text: str) -> str:
        """Make the special strings in `text` ordinary for `encode_offsets`; see `Tokenizer`."""
        return self._special.hide(text)

    def special_strings_in(self, text: str) -> list[str]:
        """The special strings that `encode` would find in `text`, in order."""
        return self._special.find(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids become their strings."""
        return self._special.decode(ids, self._processor.decode)

    def _own_or_added(self, own: int, name: str, otherwise: int | None) -> int | None:
        return own if own >= 0 else self.special_tokens.get(name, otherwise)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all pieces and special tokens."""
        pieces = map(self._processor.id_to_piece, range(self._processor.get_piece_size()))
        return fingerprint(pieces, self.special_tokens)


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
    return register(
        [*ADDED, *own, *extra_ids(vocab_extra_ids)],
        extra_tokens,
        new_tokens=new_tokens,
        known=lambda name: _id_of(processor, name),
        size=size,
    )


def _id_of(processor: SentencePieceProcessor, name: str) -> int | None:
    """The id of the piece `name`; an unknown name has the id of the unknown piece."""
    index: int = processor.piece_to_id(name)
    return index if processor.id_to_piece(index) == name else None
