"""Trained networks on new images: from files to masks, probabilities, overlays and a page.

pipeline: both networks and what lies between them. images: the files to predict. results: what is written for them, and
what an interrupted run has written already. overlay: the drawing of one image. page: all images on one HTML page.
webpage: what app.py shows of uploaded images. May import everything but evaluation and training.
"""
