"""Where weights come from and where they go."""

from dataclasses import dataclass

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = option(None, "Folder to write checkpoints to.")
    save_interval: int | None = option(
        None, "Iterations between checkpoints; one is always written at the end.", within="[1, inf)"
    )
    async_save: bool = option(
        False, "Write checkpoints in the background, from a copy in host memory, which is as large as they are."
    )
    keep_last: int | None = option(
        None, "Remove all but so many of the newest checkpoints, each time a newer one is whole.", within="[1, inf)"
    )
    keep_every: int | None = option(
        None, "Besides those of --keep_last, keep the checkpoints of every so many iterations.", within="[1, inf)"
    )
    save_optim: bool = option(True, "Write no optimizer state.")
    save_rng: bool = option(True, "No effect: random state is a function of --seed and the position in the data.")
    load: str | None = option(None, "Checkpoint folder of any layout, or a Hugging Face model folder.")
    auto_resume: bool = option(
        False,
        "Go on from the newest whole checkpoint in --save, if there is one; else begin as the other flags say: one "
        "command starts and restarts a run.",
    )
    verify_checkpoint: bool = option(True, "Do not compare the weights of --load with their checksums.")
    load_iters: int | None = option(None, "Iteration to load; by default the newest.", within="[0, inf)")
    load_optim: bool = option(True, "Read no optimizer state.")
    load_rng: bool = option(True, "No effect: random state is a function of --seed and the position in the data.")
    finetune: bool = option(False, "Take only the weights of --load, and start at iteration 0.")
    perform_initialization: bool = option(
        True, "No effect: weights that are loaded are never initialized first.", flag="--no_initialization"
    )
    use_checkpoint_args: bool = option(False, "Take architecture and parallel sizes from the checkpoint.")

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("save_interval", "async_save", "keep_last", "auto_resume"):
            if getattr(self, name) and not self.save:
                raise UsageError(f"--{name} needs --save, the folder to write to")
        if self.keep_every and not self.keep_last:
            raise UsageError("--keep_every needs --keep_last, how many of the newest are kept besides")
        for name in ("finetune", "use_checkpoint_args", "load_iters"):
            if getattr(self, name) and not self.load:
                raise UsageError(f"--{name} needs --load, the checkpoint to read")
