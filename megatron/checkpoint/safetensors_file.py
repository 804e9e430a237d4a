"""Writing safetensors files tensor by tensor, so that what is written need not be in memory at once.

    8 bytes, little endian: length of the header
    header: JSON, {name: {dtype, shape, data_offsets}, "__metadata__": {key: text}}, filled up with blanks to 8 bytes
    the tensors' bytes, back to back

Format: https://github.com/huggingface/safetensors. Files are read with the `safetensors` library.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
BLOCK_BYTES = 1 << 20
NAMED_DTYPES = {name: dtype for dtype, name in DTYPES.items()} | {
    **{"BOOL": torch.bool, "I16": torch.int16, "I8": torch.int8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Those of files, of which not all are for weights."""


@dataclass(frozen=True)
class Entry:
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsWriter:
    """Writes the tensors announced by `entries`, in that order, and reaches the disk when the context ends.

    Attributes:
        size: bytes written.
        checksum: crc32 of them, as eight hexadecimal digits.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self.size = 0
        self._crc = 0
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="checksum")
        self._entries = iter(entries)
        self._file = path.open("wb")
        header = _header(entries, metadata)
        self._write(len(header).to_bytes(8, "little") + header)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert next(self._entries, None) is None, "fewer tensors than announced"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._helper.shutdown()

    @property
    def checksum(self) -> str:
        """Of what is written so far."""
        return f"{self._crc:08x}"

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor."""
        entry = next(self._entries)
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), f"{entry} is not {tensor.shape}"
        self._write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        crc = self._helper.submit(zlib.crc32, data, self._crc)  # both leave the other threads running
        for start in range(0, len(data), BLOCK_BYTES):  # larger ones are now and then ten times slower
            self._file.write(data[start : start + BLOCK_BYTES])
        self._crc = crc.result()
        self.size += len(data)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        offsets = [offset, offset + entry.size]
        table[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        offset = offsets[1]
    header = json.dumps(table, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)
