"""Models by their name on the Hugging Face hub."""

from functools import partial
from pathlib import Path

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]
PICKLED = ["*.bin"]
OTHER_FORMS = ["consolidated*", "original/*"]
"""The same weights once more, in their makers' form."""


def model_folder(path_or_name: str, cache_dir: str | None) -> Path:
    """The folder `path_or_name`, or that of the downloaded model of that name.

    Raises:
        ValueError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        download = partial(snapshot_download, path_or_name, cache_dir=cache_dir, ignore_patterns=OTHER_FORMS)
        folder = Path(download(allow_patterns=PATTERNS))
        if any(folder.glob("*.safetensors")):
            return folder
        # Many models come in both forms, of which one is enough.
        return Path(download(allow_patterns=PATTERNS + PICKLED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path_or_name}: no such folder, and not to be had from the hub: {reason}") from error
