"""The networks and their losses.

backbones: by name, with weights and preprocessing, most of them of `keras.applications`. efficientnet_lite: backbones
that it lacks. segmentation: SegNet and U-Net. losses: losses and metrics of lesion masks. classifier: backbone and
head. colours: colour constancy. fused_batchnorm: batch normalisation by TensorFlow's fused kernel. May import
melanoma.sources, artifacts, cli and below.
"""
