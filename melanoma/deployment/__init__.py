"""Trained networks on new images: from files to masks, probabilities, overlays and a page.

pipeline: both networks and what lies between them. images: the files to predict. results: what is written for them, and
what an interrupted run has written already. overlay: the drawing of one image. page: all images on one HTML page.
foreign: flags images unlike those of training. webpage: what app.py shows of uploaded images. export: both networks for
use without this package. formats: how models are written and run in other formats. May import everything but evaluation
and training.
"""
