"""Calibration of probabilities: temperature scaling with a bias per class."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

EPSILON = 1e-7  # smallest probability whose logarithm is taken
MAX_LOG_TEMPERATURE = np.log(10)  # bound of the fit: noise would drive the temperature to infinity
MAX_BIAS = 5.0  # bound of the fit


@dataclass(frozen=True)
class Calibration:
    """Maps probabilities p to softmax(log p / temperature + bias).

    The bias undoes the shift in class frequencies caused by balancing the classes during training. A temperature above
    1 makes probabilities less extreme.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()  # of each class, that of the first 0; (): no bias

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, float32, of the same shape: the last axis is that of the classes."""
        logits = np.log(np.maximum(probabilities, EPSILON, dtype=np.float64)) / self.temperature
        return special.softmax(logits + (np.array(self.bias) if self.bias else 0), axis=-1).astype(np.float32)


IDENTITY = Calibration()


def fit(labels: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """The calibration that minimises cross-entropy.

    Args:
        labels: int (N,), of images that the networks were not trained on.
        probabilities: float (N, classes).

    Source: Guo et al. 2017, arXiv 1706.04599; with a bias: Alexandari et al. 2020, arXiv 1901.06852.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), EPSILON))
    rows = np.arange(len(labels))

    def cross_entropy(parameters: np.ndarray) -> float:
        scaled = logits * np.exp(-parameters[0]) + np.append(0, parameters[1:])
        return float((special.logsumexp(scaled, axis=1) - scaled[rows, labels]).mean())

    bounds = [(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE)] + [(-MAX_BIAS, MAX_BIAS)] * (probabilities.shape[1] - 1)
    fitted = optimize.minimize(cross_entropy, np.zeros(len(bounds)), method="L-BFGS-B", bounds=bounds).x
    return Calibration(float(np.exp(fitted[0])), (0.0, *fitted[1:].tolist()))
