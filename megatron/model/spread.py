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

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each token in fp32, [t], of logits [t, v] whose vocabulary may be divided over ranks."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

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
