"""Reading files of `torch.save` without running anything in them.

`torch.load(weights_only=True)` takes tensors and plain values; for the classes of `INERT` it puts an object that does
nothing; a file with anything else is refused.
"""

import re
from pathlib import Path
from typing import Any

import torch

INERT = (
    "argparse.Namespace",
    *("megatron.model.enums.PositionEmbeddingType", "megatron.model.enums.ModelType", "megatron.core.enums.ModelType"),
    *("megatron.model.enums.LayerType", "megatron.model.enums.AttnType", "megatron.model.enums.AttnMaskType"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
    "builtins.getattr",  # by which Python 3.11.0 to 3.11.3 writes a member of an enumeration
)
"""What Megatron-LLM's files name besides tensors and plain values: arguments, enumerations, random states, paths."""


class Inert:
    """Stands for an object of a class in `INERT`, of which it keeps what a pickle would have built it from."""

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> "Inert":
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return ", ".join(str(argument) for argument in self.arguments if argument is not Inert)


def read_pickle(path: Path) -> dict[str, Any]:
    """What a file of `torch.save` holds, its tensors mapped into memory; nothing in it is run.

    Raises:
        ValueError: it is missing, damaged, no dictionary, or names a class that is not in `INERT`.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes of itself
        text = str(error)
        if named := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(f"{path} holds {named[1]}, which is neither tensor nor plain value: refused") from error
        reason = text.rpartition("WeightsUnpickler error: ")[2].partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a file of torch.save: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary")
    return content
