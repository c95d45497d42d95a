"""Where images come from.

reader: reads a data set of any layout in `layouts` into the records of `records`; files lists what lies below a folder,
csv_table reads tables, diagnoses gives classes. archives, download: the official archives. synthetic: generates
dermoscopy images for the demo and the tests. May import melanoma.errors, classes and log.
"""
