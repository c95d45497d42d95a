"""Where images come from.

isic: the official ISIC 2017 layout on disk. archives: the official archives of ISIC 2017 and ISIC 2018 task 3.
download: fetches them. synthetic: generates dermoscopy images for the demo and the tests. May import melanoma.errors,
classes and log.
"""
