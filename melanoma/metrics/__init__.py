"""Metrics and their uncertainty: no files, no models, no plots.

segmentation    of lesion masks
classification  of probabilities against labels: curves, operating points, every metric of a split
weighted        the same classification metrics under many sets of image weights at once
bootstrap       95 % intervals, ROC bands and paired differences from resampled images

May import melanoma.errors, melanoma.classes, melanoma.log.
"""
