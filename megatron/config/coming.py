"""What the command line names but is not built yet: one row each, deleted when it is."""

from collections.abc import Callable

from megatron.config.run import RunConfig

COMING: dict[str, Callable[[RunConfig], object]] = {
    "--data_type gpt (the default; pass --data_type instruction)": lambda c: c.data.data_type == "gpt",
    "--metrics": lambda c: c.logging.metrics,
    "a blend of several data paths": lambda c: any(len(paths or ()) > 1 for paths in _paths(c)),
}
"""What is not available yet -> whether a run asks for it."""


def _paths(config: RunConfig) -> list[tuple[str, ...] | None]:
    data = config.data
    return [data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path]
