"""What the products of the model mean. Here: on one device, where each is the plain one."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


class Spread:
    """The meaning of each product on one device.

    The parallel room's `TensorSpread` gives the same methods their meaning on one of several tensor-parallel ranks.
    t tokens   h hidden   v vocabulary
    """

    def column(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Products with weights [out, h] whose outputs may be divided over ranks; x is [t, h] and read once for all."""
        return tuple(F.linear(x, weight) for weight in weights)

    def row(self, x: Tensor, weight: Tensor) -> Tensor:
        """Product with a weight [h, in] whose inputs, the outputs of `column`, may be divided over ranks."""
        return F.linear(x, weight)

    def key_value(self, weight: Tensor) -> Tensor:
        """The rows of a key or value weight, or bias, that this device computes with."""
        return weight

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Rows of an embedding [v, h] that may be divided by rows; tokens [t] -> [t, h]."""
        return F.embedding(tokens, weight)

    def own_tokens(self, x: Tensor) -> Tensor:
        """The rows of x [t, ...] that this device has of the hidden state."""
        return x

    def open_hidden(self, x: Tensor) -> Tensor:
        """What the output layer reads: x whole in t."""
        return x

    def close_hidden(self, gradient: Tensor) -> Tensor:
        """The gradient of x, of what this device computes of the gradient of `open_hidden(x)`."""
        return gradient

    def most_rows(self, weight: Tensor) -> int:
        """Rows of the output layer's weight [v, h] on the device that has most."""
        return len(weight)

    def own_labels(self, labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Columns of labels [t] among this device's `vocab_size` logits, and which are here: others have column 0."""
        return labels, torch.ones_like(labels, dtype=torch.bool)

    def join_vocabulary(self, log_sums: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Over all devices, of log-sum-exp [t] of the logits and logits of the labels [t], 0 for a label elsewhere."""
        return log_sums, targets

    def argmax(self, logits: Tensor) -> Tensor:
        """The likeliest id of each token, [t], the lowest of equal ones, of logits [t, v] whose vocabulary may be
        divided over ranks."""
        return logits.argmax(-1)

    def hidden_randomness(self) -> AbstractContextManager[None]:
        """Random state for masks over [t, h]: differs between ranks that hold different tokens."""
        return nullcontext()

    def head_randomness(self) -> AbstractContextManager[None]:
        """Random state for masks over attention heads: differs between ranks that hold different heads."""
        return nullcontext()

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Dropout over [t, h]."""
        if not probability:
            return x
        with self.hidden_randomness():
            return torch.dropout(x, probability, train=True)
