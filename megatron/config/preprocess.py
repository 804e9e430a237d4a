"""What the scripts that tokenize data have in common."""

from dataclasses import dataclass

from megatron.config.option import check_values, option


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Input and output."""

    input: tuple[str, ...] = option(
        help="What to read: .jsonl, one JSON object a line, also as .jsonl.gz or .jsonl.zst; .parquet; or a dataset "
        "of Hugging Face's, as a folder or, with --hf_split, by its name on the hub.",
        nargs="+",
    )
    output_prefix: str = option(help="Path of the output files without what the script adds, such as .bin.")
    hf_split: str | None = option(None, "Split of the Hugging Face datasets; of a folder, by default train.")
    hf_subset: str | None = option(None, "Subset (configuration) of the Hugging Face datasets that have several.")
    skip_bad_lines: bool = option(False, "Leave bad lines out and list them, instead of stopping at the first.")
    workers: int | None = option(None, "Worker processes; by default, one a processor core.", within="[1, inf)")
    chunk_size: int = option(32, "Lines that a worker takes at a time; more where lines are short.", within="[1, inf)")
    log_interval: int = option(
        10_000, "Rows between two progress lines where there is no progress bar.", within="[1, inf)"
    )
    dataset_impl: str = option("mmap", "No effect: there is one format.", choices=("lazy", "cached", "mmap"))

    def __post_init__(self) -> None:
        check_values(self)
