"""Training of both networks.

batches: batches of images and targets. loop: the training loop. callbacks: best epoch, early stopping, checkpoints.
checkpoints: the state of an interrupted training. distributed: several devices or machines. segmentation,
classification: every member of an ensemble. May import melanoma.inference and below.
"""
