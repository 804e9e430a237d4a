"""Training: a configuration and a checkpoint go in; log lines, curves and new checkpoints come out.

`start.open_start` finds both, `launch.run` builds everything, `trainer.Trainer` turns the wheel.
"""

from megatron.training.launch import run
from megatron.training.start import open_start

__all__ = ["open_start", "run"]
