"""Training: a configuration and a checkpoint go in; log lines, curves and new checkpoints come out.

`launch.run` builds everything, `trainer.Trainer` turns the wheel.
"""

from megatron.training.launch import run

__all__ = ["run"]
