"""Shared code of the numbered scripts, one folder per subject.

Imports run one way: evaluation and training, then inference, then dataset, models and metrics, then sources, artifacts
and cli, then classes, errors and log. Import this package before Keras: it keeps TensorFlow's start-up notices off the
terminal.
"""

import gc

from melanoma.cli import tensorflow_notices

gc.set_threshold(50_000)  # objects between collections: the default, 700, costs each start about a second
tensorflow_notices.hide()
