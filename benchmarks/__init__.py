"""Measurements of speed and robustness, run as modules from the repository root: `python -m benchmarks.training`.

preprocessing    speed and memory of step 1, against its version of 2018 and other libraries
training         speed and memory of training and prediction, against PyTorch (monai_densenet)
gpu_report       the same on a GPU, and the chain on synthetic images, within ten minutes (gpu_results)
selection        which epoch's weights to keep: the mean AUC of a cross-validation for each rule
scaling          training in two processes against one
kills            training that is killed repeatedly, against uninterrupted training
"""
