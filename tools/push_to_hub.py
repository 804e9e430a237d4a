"""Upload a model: `python tools/push_to_hub.py --input_dir DIR --hf_repo_name USER/NAME`.

DIR is an exported Hugging Face folder, or a checkpoint of any layout, which is exported first.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron.config import UsageError, option, parse_command, run_entry


@dataclass(frozen=True, kw_only=True)
class Options:
    """Upload to the Hugging Face hub."""

    input_dir: str = option(help="Hugging Face folder, or checkpoint of any layout.", metavar="DIR")
    hf_repo_name: str = option(help="Where to; it is made if there is none.", metavar="USER/NAME")
    auth_token: str | None = option(
        None, "Token that may write there; the variable HF_TOKEN or `hf auth login` is safer.", metavar="TOKEN"
    )
    branch: str | None = option(None, "Branch to upload to; it is made if there is none. By default the main one.")
    private: bool = option(False, "Let nobody else see a repository that is made.")
    dry_run: bool = option(False, "Check and list the files, and connect to nobody.")


def main(argv: list[str]) -> None:
    """Export if need be, check, list, upload."""
    (options,) = parse_command(argv, Options, prog="push_to_hub.py", description=(__doc__ or "").splitlines()[0])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.hf_repo_name):
        raise UsageError(f"--hf_repo_name {options.hf_repo_name} is not USER/NAME")
    from megatron.checkpoint import open_checkpoint
    from megatron.checkpoint.export import TOLERANCE, check_whole, export, logits_difference

    checkpoint = open_checkpoint(Path(options.input_dir), reads_all=True)
    for warning in checkpoint.warnings:
        print(f"warning: {warning}")
    with tempfile.TemporaryDirectory(prefix="push-to-hub-") as work:
        folder = checkpoint.folder
        if not checkpoint.is_hugging_face:
            folder = export(checkpoint, Path(work) / "hf")
            difference = logits_difference(checkpoint, folder)
            if not difference <= TOLERANCE:
                raise ValueError(f"the export of {checkpoint.folder} computes something else: logits by {difference}")
            print(f"exported {checkpoint.folder}; largest difference of logits to transformers: {difference:.1e}")
        check_whole(folder)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if is_uploaded(path)}
        for name, size in files.items():
            print(f"{size:>15,} {name}")
        print(f"{sum(files.values()):>15,} bytes in {len(files)} files")
        if options.dry_run:
            print(f"dry run: nothing was uploaded to {options.hf_repo_name}")
            return
        print(f"uploaded: {upload(folder, list(files), options)}")


def is_uploaded(path: Path) -> bool:
    """Whether a file of the folder goes along."""
    return path.is_file() and not path.name.startswith(".")


def upload(folder: Path, names: list[str], options: Options) -> str:
    """Upload the files `names`; returns their address.

    Raises:
        ValueError: the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import HfApi

    try:
        api, name = HfApi(token=options.auth_token), options.hf_repo_name
        api.create_repo(name, private=options.private, exist_ok=True)
        if options.branch:
            api.create_branch(name, branch=options.branch, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=names, revision=options.branch)
        return str(commit.commit_url)
    except Exception as error:  # of the hub's client, and of the one it speaks HTTP with, which versions choose
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{options.hf_repo_name} was not uploaded: {lines[0]}") from error


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
