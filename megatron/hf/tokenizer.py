"""Our tokenizer as Hugging Face has tokenizers: the same ids for the same text, and the chat template of training."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from megatron.tokenizer import load_tokenizer
from megatron.tokenizer.chat import CHAT_TEMPLATE
from megatron.tokenizer.chat_template import named_tokens, turn_end
from megatron.tokenizer.description import SPECIAL_TOKENS_FILE
from megatron.tokenizer.hf_tokenizer import TOKENIZER_FILE
from megatron.tokenizer.sentencepiece import MODEL_FILE

SPACE = "\u2581"
NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4
"""Types of pieces in a SentencePiece model."""
BPE_MODEL = 2
EXTRA_SPACES = ((r"\A +", ""), (rf"[ {SPACE}]+\z", ""), (" +", " "))
"""What a model that removes extra spaces replaces: at the beginning and end of the text, between words."""
FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
"""Files of a tokenizer in a Hugging Face folder."""


def token_ids(folder: Path) -> dict[str, int | None]:
    """Ids of bos, eos and pad, as config.json has them, of the tokenizer saved in `folder`."""
    tokenizer = load_tokenizer(folder)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def stop_ids(folder: Path) -> list[int]:
    """Ids at which generation ends: the end of the assistant's turn, and of a sequence."""
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.special_tokens.get(turn_end(tokenizer) or ""), tokenizer.eos_id]
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


def is_own(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer that this toolkit saved."""
    return (folder / SPECIAL_TOKENS_FILE).is_file()


def export_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer saved in `source` into the Hugging Face folder `target`.

    Raises:
        ValueError: its SentencePiece model, or its special tokens, are of a kind that has no exact equal there.
    """
    tokenizer = load_tokenizer(source)
    fast = CONVERTERS[tokenizer.tokenizer_type](source)
    _check_special_tokens(tokenizer.special_tokens, _ordinary_added(fast), source / SPECIAL_TOKENS_FILE)
    known = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    added = [name for name in tokenizer.special_tokens if name not in known]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    wrong = [name for name, token_id in tokenizer.special_tokens.items() if fast.token_to_id(name) != token_id]
    assert not wrong, f"{wrong} got other ids than {tokenizer.special_tokens}"
    fast.save(str(target / TOKENIZER_FILE))
    if (source / MODEL_FILE).is_file():
        (target / MODEL_FILE).write_bytes((source / MODEL_FILE).read_bytes())
    # no unk_token: transformers would cut text at its name, which training takes for ordinary text
    special = named_tokens(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if template := tokenizer.chat_template or (CHAT_TEMPLATE if turn_end(tokenizer) else None):
        config["chat_template"] = template
    _write_json(target / "tokenizer_config.json", config)
    _write_json(target / "special_tokens_map.json", special)


def _ordinary_added(fast: FastTokenizer) -> list[str]:
    """Tokens that are looked for beside the special ones, in the text as it is, but are ordinary text in training."""
    tokens = fast.get_added_tokens_decoder().values()
    return [token.content for token in tokens if not token.special and not token.normalized]


def _check_special_tokens(names: Iterable[str], ordinary: Iterable[str], path: Path) -> None:
    """Of two special tokens at one place training takes the one registered first, `tokenizers` the longest; and where
    an ordinary token runs into a special one, training takes the special one, `tokenizers` the one that begins first.
    """
    names = list(names)
    for first, second in combinations(names, 2):
        if second.startswith(first):
            raise ValueError(
                f"{path} cannot be exported exactly: {first!r} is registered before {second!r}, which begins with it"
            )
    for token, name in product(ordinary, names):
        if name in token or any(name.startswith(token[place:]) for place in range(1, len(token))):
            raise ValueError(f"{path} cannot be exported exactly: the ordinary token {token!r} runs into {name!r}")


def _read_proto(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _from_sentencepiece(folder: Path) -> FastTokenizer:
    """The SentencePiece model in `folder` for the `tokenizers` library: byte-pair merges by score, spaces as marks,
    bytes as a last resort; each text between special tokens gets a space in front, as SentencePiece gives it.
    """
    path = folder / MODEL_FILE
    proto = _read_proto(path)
    normalizer = proto.normalizer_spec
    unsupported = {
        "it is not a byte-pair (BPE) model": proto.trainer_spec.model_type != BPE_MODEL,
        "it normalizes text": bool(normalizer.precompiled_charsmap),
        "it marks spaces behind words": proto.trainer_spec.treat_whitespace_as_suffix,
        "it does not mark spaces": not normalizer.escape_whitespaces,
        "it has user-defined pieces": any(piece.type == USER_DEFINED for piece in proto.pieces),
        "it has a control piece of one character": any(
            piece.type not in (NORMAL, USER_DEFINED) and len(piece.piece) == 1 for piece in proto.pieces
        ),
    }
    reasons = [reason for reason, applies in unsupported.items() if applies]
    if reasons:
        raise ValueError(
            f"{path} cannot be exported exactly: {', '.join(reasons)}; train it with model_type=bpe, "
            "normalization_rule_name=identity"
        )
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    model = BPE(
        vocab=vocabulary,
        merges=list(_merges(proto)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    fast = FastTokenizer(model)
    extra = [normalizers.Replace(Regex(pattern), new) for pattern, new in EXTRA_SPACES]
    fast.normalizer = normalizers.Sequence(
        [
            *(extra if normalizer.remove_extra_whitespaces else []),
            *([normalizers.Prepend(SPACE)] if normalizer.add_dummy_prefix else []),
            normalizers.Replace(" ", SPACE),
        ]
    )
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return fast


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """Pairs to merge, best first: SentencePiece joins the pair whose piece has the highest score."""
    ranks = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    for piece in sorted((p for p in proto.pieces if p.type == NORMAL), key=lambda p: -p.score):
        text = piece.piece
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _from_tokenizer_json(folder: Path) -> FastTokenizer:
    """The tokenizer.json in `folder`: the library's already, less what it adds around a text, as no training had it."""
    content = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    return FastTokenizer.from_str(json.dumps({**content, "post_processor": None}))


CONVERTERS: dict[str, Callable[[Path], FastTokenizer]] = {
    "SentencePieceTokenizer": _from_sentencepiece,
    **dict.fromkeys(("HFTokenizer", "FalconTokenizer", "GPT2BPETokenizer"), _from_tokenizer_json),
}
"""Type of a saved tokenizer -> how its folder becomes one of the `tokenizers` library."""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
