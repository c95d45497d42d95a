"""Shared code of the numbered scripts, one folder per subject.

Imports run one way: evaluation and training, then inference, then dataset, models and metrics, then sources, artifacts
and cli, then classes, errors and log. Import this package before Keras: it keeps TensorFlow's start-up notices off the
terminal.
"""

from melanoma.cli import tensorflow_notices

tensorflow_notices.hide()
