"""From trained networks to masks and probabilities.

predict: the prediction loop. openvino: faster prediction on a CPU. postprocess: from probabilities to a lesion mask.
segment: masks of every split. ensemble: several classifiers as one. calibration: calibrated probabilities. classify:
probabilities of every split. gradcam: what raises a probability. pretrained: the weights in `pretrained/`. May import
melanoma.dataset, models, metrics and below.
"""
