"""What every side of the training benchmark is given: the same weights, the same rows in the same batches."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

IGNORED = -100
"""The label of a token without loss, as the peers spell it."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama, and how it is trained."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_attention_heads_kv: int
    ffn_hidden_size: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int

    def products(self, vocab_size: int) -> dict[tuple[int, int], int]:
        """(outputs, inputs) of each weight that tokens are multiplied with -> how many there are."""
        h, f, layers = self.hidden_size, self.ffn_hidden_size, self.num_layers
        groups = h // self.num_attention_heads * self.num_attention_heads_kv
        return {
            (h, h): 2 * layers,  # q; o
            (groups, h): 2 * layers,  # k, v
            (f, h): 2 * layers,  # gate, up
            (h, f): layers,  # down
            (vocab_size, h): 1,  # output layer
        }

    def token_flops(self, vocab_size: int) -> int:
        """Floating-point operations of these products for a token, forward and backward."""
        return sum(6 * outputs * inputs * count for (outputs, inputs), count in self.products(vocab_size).items())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sample as the peers take it: `labels` are its tokens, or `IGNORED`."""

    tokens: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some steps of training.

    Attributes:
        model: folder with the initial weights, in the Hugging Face form.
        rows: jsonl file with the rows of all steps, in order.
        vocab_file: SentencePiece model.
        data: prefix of the token files that hold the same rows and more.
        precision: bf16 or fp32, of the products; weights and Adam are in fp32.
        peer_rows: rows that a peer computes at once.
    """

    model: str
    rows: str
    data: str
    vocab_file: str
    vocab_size: int
    size: Size
    device: str
    precision: str
    steps: int
    peer_rows: int
    learning_rate: float = 1e-4
    beta2: float = 0.95

    def batches(self) -> Iterator[list[Row]]:
        """The rows of each step."""
        lines = Path(self.rows).read_text().splitlines()
        rows = [Row(**json.loads(line)) for line in lines]
        for start in range(0, self.steps * self.size.global_batch_size, self.size.global_batch_size):
            yield rows[start : start + self.size.global_batch_size]

    def write(self, path: Path) -> None:
        """For another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """What `write` wrote."""
        content = json.loads(path.read_text())
        return cls(**content | {"size": Size(**content["size"])})


@dataclass(frozen=True)
class Step:
    """What a side tells of a step: how long it took, and its loss."""

    seconds: float
    loss: float
