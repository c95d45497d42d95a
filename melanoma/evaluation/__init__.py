"""From probabilities to metrics, figures and the report.

scoring: systems, thresholds and the metrics of each split. segmentation: evaluation of the lesion masks. comparison:
two systems on the same images. subgroups: groups by sex and age. submissions: CSV files in the challenge's format.
occlusion: whether the classifier needs the lesion. plots: every kind of plot. figures: the PNGs of each script. tables:
metrics as compact tables. report: report.html and MODEL_CARD.md. May import melanoma.inference and below, not
melanoma.training.
"""
