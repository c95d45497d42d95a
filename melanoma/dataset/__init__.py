"""From files to arrays.

decode: reads image files, and masks with them, into arrays. masks: values of mask files, and whether a mask fits its
image. cache: keeps decoded images until the arrays are written. workers: runs functions in several processes or on a
cluster. checks: what a source contains and which images cannot be used. duplicates: finds images that show the same
picture. splits: splits, folds and augmented copies. augment: random augmentation, flips and rotations by 90 degrees.
arrays: writes the arrays of a split. roi: crops or masks the region of interest. May import melanoma.sources,
artifacts, cli, errors, classes and log.
"""
