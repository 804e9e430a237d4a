"""The figures of some data, counted in one pass over the memory-mapped files, a block of rows at a time."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron.data import Array
from megatron.inspection.token_files import TokenFiles
from megatron.inspection.vocabulary import Vocabulary
from megatron.tokenizer.chat import Role

BLOCK_TOKENS = 1 << 20
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Limit:
    """What becomes of rows that are longer than `seq_length` tokens and the one that is only predicted.

    Attributes:
        seq_length: None if all rows are taken whole.
        drops: whether they are left out, instead of cut off.
    """

    seq_length: int | None = None
    drops: bool = False

    def keeps(self, lengths: Array) -> Array:
        """Whether rows of `lengths` tokens are used at all."""
        longest = self.seq_length + 1 if self.drops and self.seq_length else np.inf
        return lengths <= longest

    def used(self, lengths: Array) -> Array:
        """How many of the tokens of rows of `lengths` are used."""
        if not self.seq_length:
            return lengths
        return np.where(self.keeps(lengths), np.minimum(lengths, self.seq_length + 1), 0)


@dataclass
class Stray:
    """Values that should not be there: how many, and the first, at `position` of `row`."""

    count: int = 0
    row: int = 0
    position: int = 0
    value: int = 0

    def add(self, outside: Array, values: Array, starts: Array, first_row: int) -> None:
        """Count in the places of a block where `outside` is true; its rows begin at `starts`."""
        places = np.flatnonzero(outside)
        if len(places) and not self.count:
            place = int(places[0])
            row = int(np.searchsorted(starts, place, side="right")) - 1
            self.row, self.position = first_row + row, place - int(starts[row])
            self.value = int(values[place])
        self.count += len(places)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was counted, in rows (of plain text: documents) and tokens.

    Attributes:
        rows: all rows, and so on.
        tokens: all tokens.
        tokens_per_role: of these, by `Role`; empty for plain text.
        longer: rows longer than the limit.
        unused: tokens lost with them.
        predicted: tokens that are predicted: of what is used, all but the first of each row.
        supervised: of these, the assistant's.
        empty: rows without tokens.
        unsupervised: rows that are used, but in which nothing is supervised.
        duplicates: rows equal to an earlier one, empty ones apart.
        first_duplicate: (row, the earlier one), if there are any.
        double_bos: rows with two BOS one after the other.
        ended: rows whose last token is EOD.
        ids: int64 [vocabulary], how often each id is there; empty if its size is not known.
        stray_ids: ids outside the vocabulary.
        stray_roles: roles that are none.
    """

    rows: int
    tokens: int
    tokens_per_role: list[int]
    longer: int
    unused: int
    predicted: int
    supervised: int
    empty: int
    unsupervised: int
    duplicates: int
    first_duplicate: tuple[int, int] | None
    double_bos: int
    ended: int
    ids: Array
    stray_ids: Stray
    stray_roles: Stray

    @property
    def supervised_share(self) -> float:
        """Of the predicted tokens."""
        return self.supervised / self.predicted if self.predicted else 0.0


def count(files: TokenFiles, vocabulary: Vocabulary, limit: Limit) -> Figures:
    """Count everything; a progress bar is shown on a terminal.

    Takes memory for a block, or for the longest row, and some numbers for each row.
    """
    counter = _Counter(files, vocabulary, limit)
    total = int(files.bounds[-1] - files.bounds[0])
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="counting", disable=None, leave=False) as bar:
        for start, stop in blocks(files.bounds):
            bar.update(counter.add(start, stop))
    return counter.figures(total)


def blocks(bounds: Array) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that have at most `BLOCK_TOKENS` tokens together; a longer row is alone."""
    start = 0
    while start < len(bounds) - 1:
        stop = int(np.searchsorted(bounds, bounds[start] + BLOCK_TOKENS, side="right")) - 1
        yield start, max(stop, start + 1)
        start = max(stop, start + 1)


class _Counter:
    def __init__(self, files: TokenFiles, vocabulary: Vocabulary, limit: Limit) -> None:
        self._files, self._vocabulary, self._limit = files, vocabulary, limit
        self._ids = np.zeros(vocabulary.size or 0, np.int64)
        self._roles = np.zeros(len(Role), np.int64)
        self._stray_ids, self._stray_roles = Stray(), Stray()
        self._supervised = self._unsupervised = self._double_bos = self._ended = 0
        self._digests = bytearray()

    def add(self, start: int, stop: int) -> int:
        """Count rows `start .. stop`; how many tokens they have."""
        files = self._files
        first, last = int(files.bounds[start]), int(files.bounds[stop])
        starts, ends = files.bounds[start:stop] - first, files.bounds[start + 1 : stop + 1] - first
        tokens = np.asarray(files.tokens.elements(first, last))
        roles = np.asarray(files.roles.elements(first, last)) if files.roles else None
        if len(self._ids):
            self._ids += _histogram(tokens, len(self._ids), self._stray_ids, starts, start)
        if roles is not None:
            self._roles += _histogram(roles, len(Role), self._stray_roles, starts, start)
            self._add_supervised(roles, starts, ends)
        self._add_ends(tokens, starts, ends)
        halves = [tokens] if roles is None else [tokens, roles]
        self._digests += b"".join(_digests(halves, starts, ends))
        return len(tokens)

    def _add_supervised(self, roles: Array, starts: Array, ends: Array) -> None:
        used = self._limit.used(ends - starts)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(roles == Role.ASSISTANT)])
        # The first token of a row is never predicted.
        supervised = before[starts + used] - before[starts + np.minimum(used, 1)]
        self._supervised += int(supervised.sum())
        self._unsupervised += int(((supervised == 0) & self._limit.keeps(ends - starts)).sum())

    def _add_ends(self, tokens: Array, starts: Array, ends: Array) -> None:
        bos_id, eod_id = self._vocabulary.bos_id, self._vocabulary.eod_id
        if bos_id is not None:
            is_bos = tokens == bos_id
            second = np.flatnonzero(is_bos[1:] & is_bos[:-1]) + 1
            rows = np.searchsorted(ends, second, side="right")
            self._double_bos += len(np.unique(rows[second != starts[rows]]))
        if eod_id is not None:
            self._ended += int((tokens[ends[ends > starts] - 1] == eod_id).sum())

    def figures(self, total: int) -> Figures:
        """Everything that was added."""
        lengths, used = self._files.lengths, self._limit.used(self._files.lengths)
        duplicates, first = _duplicates(self._digests, lengths)
        has_roles = self._files.roles is not None
        return Figures(
            rows=len(lengths),
            tokens=total,
            tokens_per_role=self._roles.tolist() if has_roles else [],
            longer=int((used < lengths).sum()),
            unused=total - int(used.sum()),
            predicted=int(np.maximum(used - 1, 0).sum()),
            supervised=self._supervised,
            empty=int((lengths == 0).sum()),
            unsupervised=self._unsupervised,
            duplicates=duplicates,
            first_duplicate=first,
            double_bos=self._double_bos,
            ended=self._ended,
            ids=self._ids,
            stray_ids=self._stray_ids,
            stray_roles=self._stray_roles,
        )


def _histogram(values: Array, size: int, stray: Stray, starts: Array, first_row: int) -> Array:
    """How often each of 0 .. `size` is there, int64 [size]; others are strays."""
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= size):
        outside = (values < 0) | (values >= size)
        stray.add(outside, values, starts, first_row)
        values = values[~outside]
    return np.bincount(values, minlength=size)


def _digests(halves: list[Array], starts: Array, ends: Array) -> Iterator[bytes]:
    """A cryptographic hash of each row that is not empty."""
    views = [(half.view(np.uint8).data, half.itemsize) for half in halves]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end > start:
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            for view, size in views:
                digest.update(view[start * size : end * size])
            yield digest.digest()


def _duplicates(digests: bytearray, lengths: Array) -> tuple[int, tuple[int, int] | None]:
    """Rows equal to an earlier one, and the first such row with the earlier one."""
    high, low = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: equal rows stay in their order
    same = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    if not same.any():
        return 0, None
    places = np.flatnonzero(same) + 1
    later = places[np.argmin(order[places])]
    group = np.flatnonzero(np.concatenate([[True], ~same])[: later + 1])[-1]
    rows = np.flatnonzero(lengths)
    return int(same.sum()), (int(rows[order[later]]), int(rows[order[group]]))
