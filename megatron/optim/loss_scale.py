"""Loss scaling: fp16 gradients are multiplied by a scale before the backward pass so that small ones do not vanish."""

from typing import Any, Protocol

from megatron.config import PrecisionConfig

GROWTH = 2.0
BACKOFF = 0.5


class LossScale(Protocol):
    """A factor on the loss, told after each step whether any gradient was infinite or not a number."""

    @property
    def scale(self) -> float:
        """The factor of the next backward pass; gradients are divided by it before they are used."""
        ...

    @property
    def can_shrink(self) -> bool:
        """Whether a gradient that is not finite may be due to a scale that is still too large."""
        ...

    def update(self, found_non_finite: bool) -> None:
        """Adapt the scale after a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores (JSON values)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state."""
        ...


class ConstantLossScale:
    """A fixed scale: 1 for bf16 and fp32, or `--loss_scale`."""

    def __init__(self, scale: float = 1.0) -> None:
        self._scale = scale

    @property
    def scale(self) -> float:
        """The fixed factor."""
        return self._scale

    @property
    def can_shrink(self) -> bool:
        """It cannot."""
        return False

    def update(self, found_non_finite: bool) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to store: the scale comes from the flags."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class DynamicLossScale:
    """Megatron's rules: halve after `hysteresis` non-finite steps, double after `window` good steps in a row.

    The count of non-finite steps is forgiven only when the scale grows, so once it is used up every further one halves.
    """

    def __init__(self, initial: float, minimum: float, window: float, hysteresis: int) -> None:
        self._scale = initial
        self._minimum = minimum
        self._window = window
        self._hysteresis = hysteresis
        self._good_steps = 0
        self._tolerance = hysteresis

    @property
    def scale(self) -> float:
        """The factor of the next backward pass."""
        return self._scale

    @property
    def can_shrink(self) -> bool:
        """Down to the minimum."""
        return self._scale > self._minimum

    def update(self, found_non_finite: bool) -> None:
        """Shrink after non-finite gradients, grow after a whole window without."""
        if found_non_finite:
            self._good_steps = 0
            self._tolerance -= 1
            if self._tolerance <= 0:
                self._scale = max(self._scale * BACKOFF, self._minimum)
            return
        self._good_steps += 1
        if self._good_steps == self._window:
            self._good_steps = 0
            self._tolerance = self._hysteresis
            self._scale *= GROWTH

    def state_dict(self) -> dict[str, Any]:
        """Scale and both counters."""
        return {"scale": self._scale, "good_steps": self._good_steps, "tolerance": self._tolerance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; an empty one (from a run without dynamic scaling) changes nothing."""
        self._scale = state.get("scale", self._scale)
        self._good_steps = state.get("good_steps", self._good_steps)
        self._tolerance = state.get("tolerance", self._tolerance)


def build_loss_scale(precision: PrecisionConfig) -> LossScale:
    """`--loss_scale` where given; else dynamic for fp16 and 1 for bf16 and fp32."""
    if precision.loss_scale is not None:
        return ConstantLossScale(float(precision.loss_scale))
    if not precision.fp16:
        return ConstantLossScale(1.0)
    return DynamicLossScale(
        float(precision.initial_loss_scale),
        precision.min_loss_scale,
        int(precision.loss_scale_window),
        precision.hysteresis,
    )
