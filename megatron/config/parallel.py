"""How the work is spread over devices, and which kernels do it."""

from dataclasses import dataclass

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism."""

    tensor_model_parallel_size: int = option(1, "Ranks that share each layer.", within="[1, inf)")
    pipeline_model_parallel_size: int = option(
        1, "Groups of ranks that each hold some of the layers.", within="[1, inf)"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None,
        "Interleave: a stage holds several chunks of at most so many layers; no effect with one stage.",
        within="[1, inf)",
    )
    layers_per_pipeline_stage: tuple[int, ...] = option(
        (),
        "Layers of each stage, from the first; interleaved, of each chunk in the order of the layers. By default even.",
        within="[1, inf)",
        nargs="+",
    )
    sequence_parallel: bool = option(
        False, "Divide the tokens, too, over tensor-parallel ranks between the products; no effect with one rank."
    )
    distributed_backend: str = option(
        "nccl", "nccl on GPUs; on CPUs it is gloo, which only works there.", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(
        30.0, "A rank that waits for others for so long gives up, and the run fails.", within="(0, inf)"
    )
    use_distributed_optimizer: bool = option(
        False, "No effect: optimizer state and master weights are always divided over data-parallel ranks."
    )
    full_sharding: bool = option(
        False, "Gather weights layer by layer and free them after use (ZeRO-3): less memory, more traffic."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.layers_per_pipeline_stage and self.num_layers_per_virtual_pipeline_stage:
            raise UsageError(
                "--layers_per_pipeline_stage and --num_layers_per_virtual_pipeline_stage exclude each other; give one"
            )


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Kernels."""

    use_flash_attn: bool = option(False, "Use flash-attn where it is installed; the log names the kernel in use.")
    compile: bool = option(False, "Compile each layer by torch.compile; the first iterations take longer.")
