"""What the numbered scripts share: one module per subject, the folder list is the index."""

import os

# TensorFlow prints start-up notices, among them an "error" wherever there is no GPU; a few come before it reads this.
# What goes wrong in a computation reaches us as an exception all the same. Takes effect only before its import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
