"""Shared code of the numbered scripts, one folder per subject.

Imports run one way: evaluation and training, then inference, then dataset, models and metrics, then sources, artifacts
and cli, then classes, errors and log. Import this package before Keras: it keeps TensorFlow's start-up notices off the
terminal.
"""

import atexit
import gc

from melanoma.cli import tensorflow_notices

# Without these two, collections of unreachable objects take 2 s of each start and end on TensorFlow.
gc.set_threshold(50_000)  # objects between collections; Python's default is 700
atexit.register(gc.freeze)  # no collection at the end
tensorflow_notices.hide()
