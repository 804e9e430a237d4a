"""What a verification says: what is run, the table, the verdict."""

from collections.abc import Sequence

from megatron.config import RunConfig
from megatron.parallel.build import ParallelModel
from megatron.parallel.mesh import Mesh
from megatron.parallel.plan import virtual_stages
from megatron.verification.rows import Row

HEADER = f"{'check':<37} {'difference':>10} {'tolerance':>10}  {'':<7} where it is largest"


def description(config: RunConfig, small: RunConfig, vocab_size: int, mesh: Mesh, model: ParallelModel) -> str:
    """The layout, and the tiny model that stands for the run's."""
    parallel, recompute, tiny = small.parallel, small.recompute.recompute_granularity, small.model
    assert tiny.num_layers
    stages = [len(layers) for layers in virtual_stages(parallel, tiny.num_layers)]
    extras = [
        *(["sequence parallel"] if parallel.sequence_parallel and mesh.size("tp") > 1 else []),
        *(["full sharding"] if parallel.full_sharding else []),
        *([f"recompute {recompute}"] if recompute else []),
        f"packing {small.data.packing}",
        str(model.compute_dtype).removeprefix("torch."),
        model.kernel,
    ]
    return "\n".join(
        [
            f"{mesh}; {', '.join(extras)}",
            f"{config.model.model_name}, hidden size {config.model.hidden_size}, stands here as: layers "
            f"{' + '.join(map(str, stages))}, hidden size {tiny.hidden_size}, {tiny.num_attention_heads} heads, "
            f"{tiny.num_attention_heads_kv} key/value heads, vocabulary {vocab_size}; "
            f"{small.training.train_iters} steps of {small.training.global_batch_size} samples",
        ]
    )


def table(rows: Sequence[Row]) -> str:
    """A line a check."""
    return "\n".join([HEADER, *map(_line, rows)])


def _line(row: Row) -> str:
    if row.left_out:
        return f"{row.check:<37} {'-':>10} {row.tolerance:>10.0e}  {'-':<7} {row.left_out}"
    place = " ".join([f"step {row.step}", *([row.name] if row.name else [])]) if row.difference else ""
    verdict = "ok" if row.ok else "FAILED"
    return f"{row.check:<37} {row.difference:>10.1e} {row.tolerance:>10.0e}  {verdict:<7} {place}".rstrip()


def verdict(rows: Sequence[Row], causes: Sequence[str]) -> str:
    """The last lines: whether all is well, else what is wrong."""
    failed = [row.check for row in rows if not row.ok]
    compared = [row for row in rows if not row.left_out]
    if not failed:
        return f"ok: on this layout training is what it is on one device ({len(compared)} checks)"
    lines = [
        f"FAILED: {len(failed)} of {len(compared)} checks: on this layout training is not what it is on one device"
    ]
    return "\n".join([*lines, *(f"  cause: {cause}" for cause in causes)])
