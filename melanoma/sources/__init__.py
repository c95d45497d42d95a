"""Where images come from.

csv_table: CSV files in every usual dialect. isic: the official ISIC 2017 layout on disk. download: fetches its
archives. synthetic: generates dermoscopy images for the demo and the tests. May import melanoma.errors, classes and
log.
"""
