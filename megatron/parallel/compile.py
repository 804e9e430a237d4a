"""`--compile`: each layer is compiled by itself, in place.

Only its `forward` is: parameters keep their names, and FSDP2's hooks, which gather weights, run outside the graphs. All
layers of a stage share what was compiled. The first length of rows is compiled as a constant, the second one as a
symbol, which all further lengths share.
"""

from dataclasses import replace

import torch

from megatron.config import UsageError
from megatron.model import AttentionKernel, Model
from megatron.model.attention import BY_DOCUMENT
from megatron.model.layer import run_layers
from megatron.parallel.recompute import selective


def compile_layers(model: Model, recompute_granularity: str | None) -> None:
    """Compile every layer; that happens when one is called for the first time.

    Selective recomputation looks at single operations, which a compiled layer does not show, so its checkpoint is
    compiled with the layer.
    """
    selects = recompute_granularity == "selective"
    if selects:
        model.run_layers = run_layers
    for layer in model.layers.values():
        layer.forward = torch.compile(selective(layer.forward) if selects else layer.forward)


def compilable(kernel: AttentionKernel, dropout: float, recompute_granularity: str | None) -> AttentionKernel:
    """The kernel, as compiled layers can call it: one that reads the documents' lengths divides a layer's graph in two.

    With dropout most kernels do.

    Raises:
        UsageError: such a kernel under selective recomputation, whose checkpoint has to be in one graph.
    """
    if kernel is not BY_DOCUMENT and not dropout:
        return kernel
    if recompute_granularity == "selective":
        raise UsageError(
            f"--compile does not go with --recompute_granularity selective where attention is {kernel.name}; train in "
            "--bf16 on a GPU, or give --recompute_granularity full, or leave one of them out"
        )
    return replace(kernel, attend=torch.compiler.disable(kernel.attend))


def check_compiler(device: torch.device) -> None:
    """Compile a product, to see whether that works at all.

    Raises:
        UsageError: it does not.
    """
    try:
        torch.compile(lambda x: x * x)(torch.ones(8, device=device))
    except RuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UsageError(
            f"--compile: PyTorch cannot compile here ({reason}); it needs a C++ compiler, on a GPU Triton and a C "
            "compiler: install them, or leave --compile out"
        ) from error
