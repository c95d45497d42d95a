"""The layouts of data sets that are read: one module each, listed in `melanoma.sources.reader`.

layout: what they have in common. challenge_2016, challenge_2017, challenge_one_hot (2018 and 2019), challenge_2020: the
ISIC challenges. ham10000, isic_archive, ph2: other data sets. image_folder, own_csv: the user's own images.
"""
