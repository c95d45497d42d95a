"""What the command lines of all scripts have in common.

flags: common flags and argparse types. run: exit codes, signals, error messages. locking: one run per folder. hardware:
memory, devices, and advice on their errors. tensorflow_notices: hides what TensorFlow prints while it starts.
May import melanoma.classes, errors and log.
"""
