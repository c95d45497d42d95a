"""From what a network says to what comes true: temperature scaling."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

TINY = 1e-7  # below which a probability's logarithm says nothing more
STEEPEST = np.log(10)  # of a fit: temperatures from a tenth to ten; answers that tell nothing ask for endless ones
LARGEST = 5.0  # bias of a fit


@dataclass(frozen=True)
class Calibration:
    """Probabilities p become softmax(log p / temperature + bias).

    The bias undoes what balancing the classes for training does to their frequencies; the temperature, above 1, makes
    the answers less sure.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()  # of each class, the first 0; (): none

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, float32 (N, classes)."""
        logits = np.log(np.maximum(probabilities, TINY, dtype=np.float64)) / self.temperature
        return special.softmax(logits + (np.array(self.bias) if self.bias else 0), axis=1).astype(np.float32)


IDENTITY = Calibration()


def fit(labels: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """The calibration with the lowest cross-entropy.

    Args:
        labels: int (N,), of images that the networks have not learnt from.
        probabilities: float (N, classes).

    Source: Guo et al. 2017, arXiv 1706.04599; with a bias: Alexandari et al. 2020, arXiv 1901.06852.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), TINY))
    rows = np.arange(len(labels))

    def cross_entropy(parameters: np.ndarray) -> float:
        scaled = logits * np.exp(-parameters[0]) + np.append(0, parameters[1:])
        return float((special.logsumexp(scaled, axis=1) - scaled[rows, labels]).mean())

    bounds = [(-STEEPEST, STEEPEST)] + [(-LARGEST, LARGEST)] * (probabilities.shape[1] - 1)
    found = optimize.minimize(cross_entropy, np.zeros(len(bounds)), method="L-BFGS-B", bounds=bounds).x
    return Calibration(float(np.exp(found[0])), (0.0, *found[1:].tolist()))
