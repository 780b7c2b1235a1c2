"""What devices that are not here are expected to give, from simulated rounding; nothing is run on any of them."""

__all__ = ["PREDICTED", "DevicePrediction", "predict_devices"]

from dataclasses import dataclass

import numpy as np

from convert import Checkpoint

from .rounding import Rounding
from .tolerance import SIMULATION, Deviation, Simulation, deviation, simulated_logits

# Which devices compute so, at which setting, and how they round.
PREDICTED = (
    ("any, A100 and H100 included", 'float32, "highest" (on a CPU always)', Rounding()),
    ("A100, H100", 'float32, "high" and "default"', Rounding(unit="tf32")),
    ("the same, if operands are truncated", 'float32, "high" and "default"', Rounding(unit="tf32_truncated")),
    ("TPU", 'float32, "highest": six bfloat16 passes', Rounding(unit="bfloat16_6x")),
    ("TPU", 'float32, "high": three passes', Rounding(unit="bfloat16_3x")),
    ("TPU", 'float32, "default": one pass', Rounding(unit="bfloat16")),
    ("any", "bfloat16", Rounding("bfloat16")),
)


@dataclass(frozen=True)
class DevicePrediction:
    """The expected error of a device's logits, over images and draws, and the fraction of images whose first class stays."""

    devices: str
    setting: str
    logits: Deviation
    same_class: float


def predict_devices(checkpoint: Checkpoint, images: np.ndarray, simulation: Simulation = SIMULATION) -> list[DevicePrediction]:
    """What each kind of device is expected to give on these weights and images (n, h, w, channels)."""
    config, weights = checkpoint.config, checkpoint.to("google").as_numpy()
    predictions = []
    for devices, setting, rounding in PREDICTED:
        right, simulated = simulated_logits(config, weights, images, rounding, simulation)
        errors = [deviation(logits, right) for logits in simulated]
        rms = float(np.sqrt(np.mean([error.rms**2 for error in errors])))
        error = Deviation(max(error.max_abs for error in errors), rms, errors[0].scale)
        same_class = float(np.mean(simulated.argmax(axis=2) == right.argmax(axis=1)))
        predictions.append(DevicePrediction(devices, setting, error, same_class))
    return predictions
