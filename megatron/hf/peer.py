"""The model of `transformers` that ours are compared with."""

import sys
from pathlib import Path
from typing import Any

import torch


def load_peer(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model in a Hugging Face folder, for evaluation; its progress bar is silent where there is no terminal.

    Raises:
        OSError, ValueError: `transformers` cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
