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
    save_optim: bool = option(True, "Write no optimizer state.")
    save_rng: bool = option(True, "No effect: random state is a function of --seed and the position in the data.")
    load: str | None = option(None, "Checkpoint folder of any layout, or a Hugging Face model folder.")
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
        if self.save_interval and not self.save:
            raise UsageError("--save_interval needs --save, the folder to write to")
        for name in ("finetune", "use_checkpoint_args", "load_iters"):
            if getattr(self, name) and not self.load:
                raise UsageError(f"--{name} needs --load, the checkpoint to read")
