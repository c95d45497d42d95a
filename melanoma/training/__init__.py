"""Training of both networks.

batches: batches of images and targets. loop: the training loop. callbacks: the epoch kept, early stopping, checkpoints.
checkpoints: the state of an interrupted training. distributed: several devices or machines. recipe: settings of a
classifier's training. teacher: soft labels. segmentation, classification: every member of an ensemble. May import
melanoma.inference and below.
"""
