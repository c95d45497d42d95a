"""The files that pass from one script to the next, and how they are written and read.

contract: every file with its dtype, shape and range. store: the data folder with its manifest. atomic: files that are
complete or absent. May import melanoma.classes, errors and log.
"""
