"""The model of `transformers` that ours is compared with, one row at a time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.data import Array
from megatron.hf.peer import load_peer
from megatron.parallel.logits import EMBEDDING


class HuggingFaceModel:
    """The model in `folder`, in precision `dtype` on `device`.

    n tokens of the row   h hidden   v vocabulary

    Raises:
        OSError, ValueError: `transformers` cannot load it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.model = load_peer(folder, dtype).to(device)
        self.device = device

    def __str__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{type(self.model).__name__} of transformers in {dtype} on {self.device}"

    @torch.no_grad()
    def logits(self, ids: Array) -> Tensor:
        """Logits [n, v] of a row's `ids` [n]."""
        logits: Tensor = self.model(torch.as_tensor(ids, device=self.device)[None], use_cache=False).logits[0]
        return logits

    def hidden_states(self, ids: Array, num_layers: int) -> dict[int, Tensor]:
        """The hidden state [n, h] after the embedding (`EMBEDDING`) and after each layer, by number.

        `output_hidden_states` would give the last one after the final norm only.
        """
        kept: dict[int, Tensor] = {}

        def keep(number: int, value: Any) -> None:
            kept[number] = (value[0] if isinstance(value, tuple) else value)[0].detach()

        lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList) and len(part) == num_layers]
        hooks = [
            lists[0][0].register_forward_pre_hook(
                lambda _, args, named: keep(EMBEDDING, args[0] if args else named["hidden_states"]), with_kwargs=True
            )
        ]
        for number, layer in enumerate(lists[0]):
            hooks.append(layer.register_forward_hook(lambda _, args, result, number=number: keep(number, result)))
        self.logits(ids)
        for hook in hooks:
            hook.remove()
        return kept
