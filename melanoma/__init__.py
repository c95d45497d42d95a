"""What the numbered scripts share: one module per subject, the folder list is the index."""

import os

# TensorFlow prints start-up notices on stderr that hide our own messages; 2 keeps its errors.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
