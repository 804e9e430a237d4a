"""Memory of the output layer and its loss, with whole logits and in chunks, and of a run from stage to stage.

Of the output layer, forward and backward, PyTorch's profiler follows what is allocated besides hidden states, weight
and labels, all random; of a run, the system says how much memory is resident.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.config import option, parse_command
from tools.benchmark.memory_run import memory_of_a_run
from tools.benchmark.report import ReportOptions, Table, report

if TYPE_CHECKING:
    from torch import Tensor

Loss = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(hidden state [t, h], weight [v, h], labels [t]) -> sum of the token losses."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Benchmark"""

    vocab_sizes: tuple[int, ...] = option((32000, 128000), "Sizes of the vocabulary.", nargs="+")
    tokens: int = option(4096, "Tokens of a micro batch.", within="[1, inf)")
    hidden_size: int = option(768, "Of the hidden state.", within="[1, inf)")
    dtype: str = option("bfloat16", "Of the products.", choices=("bfloat16", "float16", "float32"))
    num_layers: int = option(12, "Layers of the run's model.", within="[1, inf)")
    run_hidden_size: int = option(1024, "Its hidden size.", within="[64, inf)")


def whole_logits(x: "Tensor", weight: "Tensor", labels: "Tensor") -> "Tensor":
    """The plain way."""
    from torch.nn import functional

    return functional.cross_entropy(functional.linear(x, weight).float(), labels, reduction="sum")


def in_chunks(x: "Tensor", weight: "Tensor", labels: "Tensor") -> "Tensor":
    """As the model does it."""
    from megatron.model import Spread
    from megatron.model.cross_entropy import output_loss

    return output_loss(Spread(), x, weight, labels, x.new_ones(len(x)).float())


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that is allocated on the CPU at once during a call, beyond what was before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def output_layer_peak(loss: Loss, tokens: int, hidden_size: int, vocab_size: int, dtype: str) -> int:
    """Bytes of the loss and the gradients of hidden state and weight, at most at once."""
    import torch

    x, weight = (
        torch.randn(rows, hidden_size, dtype=getattr(torch, dtype), requires_grad=True) for rows in (tokens, vocab_size)
    )
    labels = torch.randint(vocab_size, (tokens,))
    return peak_bytes(lambda: loss(x, weight, labels).backward())


def main(argv: list[str]) -> None:
    """Measure and report."""
    options, output = parse_command(argv, MemoryOptions, ReportOptions, prog="memory", description=__doc__)
    rows = [
        {
            "vocabulary": vocab_size,
            "way": name,
            "peak (MB)": output_layer_peak(loss, options.tokens, options.hidden_size, vocab_size, options.dtype) / 1e6,
            "whole logits in fp32 (MB)": options.tokens * vocab_size * 4 / 1e6,
        }
        for vocab_size in options.vocab_sizes
        for name, loss in {"whole logits": whole_logits, "in chunks": in_chunks}.items()
    ]
    layouts = {"vocabulary": "d", "way": "s", "peak (MB)": ".0f", "whole logits in fp32 (MB)": ".0f"}
    title = f"Output layer and loss, {options.tokens} tokens, hidden size {options.hidden_size}, {options.dtype}"
    run = memory_of_a_run(options.num_layers, options.run_hidden_size)
    report("memory", options, [Table(title, layouts, rows), run], output)
