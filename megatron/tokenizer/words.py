"""Words encoded once and remembered, for SentencePiece models whose merges never reach over the beginning of a word."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from megatron.tokenizer.base import Array

SPACE = "▁"
"""What SentencePiece turns a space into: its space mark."""
MOST_WORDS = 1 << 17
"""Words remembered; 20 MB of ordinary ones."""
LONGEST_WORD = 32
"""Characters; longer words hardly repeat."""
WORD_BEGINS = re.compile("(?<=[^ ]) ")


def words_are_apart(model: bytes) -> bool:
    """Whether the SentencePiece model encodes text to what its words become one by one, each with the spaces before it.

    BPE merges two neighbours where they are a piece together, the best pair first and the left one of equals. If no
    piece has a space mark behind another character, no merge reaches over the beginning of a word, and those within a
    word come in the same order with and without other words around. That holds for the whole way from the text if
    nothing but the space mark changes it: one in front of the text, and one for each space. Left out are

    - unigram models, whose sums of scores are rounded on the way through the text;
    - unused pieces, which are cut again at a place that depends on the rest of the text;
    - a user's own pieces with a space mark, which change the places of tokens where the text itself has one;
    - models without a space mark of its own: neighbouring unknown characters become one token.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer, kind = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    types = {piece.piece: piece.type for piece in proto.pieces}
    return (
        trainer.model_type == trainer.BPE
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not (trainer.treat_whitespace_as_suffix or normalizer.remove_extra_whitespaces)
        and not normalizer.precompiled_charsmap
        and types.get(SPACE) == kind.NORMAL
        and kind.UNUSED not in types.values()
        and not any(SPACE in piece and types[piece] == kind.USER_DEFINED for piece in types)
        and not any(SPACE in piece.lstrip(SPACE) for piece in types)
    )


class WordMemo:
    """Encodes texts word by word, each word once as long as it is remembered."""

    def __init__(self, encode: Callable[[list[str]], Iterable[Array]], mark: Array) -> None:
        """`encode`: ids of each text, int32, with a space mark put in front; `mark`: those of a space mark alone."""
        self._encode = encode
        self._known = {"": mark.tobytes()}

    def encode(self, texts: Iterable[str]) -> list[Array]:
        """Ids of each text, int32."""
        runs: list[bytes] = []
        gaps: dict[int, list[str]] = {}
        for place, text in enumerate(texts):
            words = _words(text)
            try:
                runs.append(self._ids(words))
            except KeyError:
                runs.append(b"")
                gaps[place] = words
        if gaps:
            self._fill(runs, gaps)
        return [np.frombuffer(run, np.int32) for run in runs]

    def _ids(self, words: Sequence[str]) -> bytes:
        return b"".join(map(self._known.__getitem__, words))

    def _fill(self, runs: list[bytes], gaps: Mapping[int, Sequence[str]]) -> None:
        """Put into `runs`, at each place of `gaps`, the ids of its words, of which some are not known yet."""
        new = list(dict.fromkeys(word for words in gaps.values() for word in words if word not in self._known))
        self._known.update(zip(new, (ids.tobytes() for ids in self._encode(new)), strict=True))
        for place, words in gaps.items():
            runs[place] = self._ids(words)
        for word in new:
            if len(word) > LONGEST_WORD:
                del self._known[word]
        if len(self._known) > MOST_WORDS:  # start afresh: what comes may be another language
            self._known = {"": self._known[""]}


class PlacedWordMemo(WordMemo):
    """The same with places: a token is three numbers, its id, and where it begins and ends, in characters."""

    def _ids(self, words: Sequence[str]) -> bytes:
        runs = list(map(self._known.__getitem__, words))
        rows = np.frombuffer(bytearray(b"".join(runs)), np.int32).reshape(-1, 3)
        counts = np.fromiter(map(len, runs), np.int64, len(runs)) // rows.itemsize // 3
        begins = np.cumsum([0, *(len(word) + 1 for word in words)], dtype=np.int32)[:-1]
        rows[:, 1:] += np.repeat(begins, counts)[:, None]
        rows[np.cumsum(counts)[:-1], 1] -= 1  # the space mark of all words but the first stands for a space
        return rows.tobytes()


def _words(text: str) -> list[str]:
    """The words of a text, each with all but the first of the spaces before it: one in front of the text counts too."""
    if not text:
        return []
    text = text.replace(SPACE, " ")
    several = "  " in text or text[0] == " "
    return WORD_BEGINS.split(text) if several else text.split(" ")
