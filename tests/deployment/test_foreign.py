"""The flag of images unlike those of training."""

from dataclasses import asdict
from pathlib import Path

from melanoma.artifacts.atomic import sha256
from melanoma.dataset import decode
from melanoma.deployment import foreign, pipeline
from melanoma.deployment.images import ImageFile, Read
from melanoma.deployment.pipeline import Pipeline
from melanoma.errors import InputError
from melanoma.inference import ensemble, openvino, pretrained
from melanoma.inference.segment import MaskOptions, Segmenter
from melanoma.models import backbones, classifier, segmentation
from melanoma.models.segmentation import Design

import keras
import numpy as np
import pytest
import toy
from pipeline import BACKBONE, ROOT
from sklearn.metrics import roc_auc_score

SIZE, CHANNELS = 32, toy.FEATURES
DESIGN = Design("unet", SIZE, BACKBONE)
SETTINGS = {"design": asdict(DESIGN), "sha256": {"segnet.weights.h5": "a"}}
SHARED = ROOT.parent / "shared" / "isic2017"
NEAR, FAR = 0, 100  # features


def values(seed: int, count: int, center: float = NEAR) -> np.ndarray:
    return center + np.random.default_rng(seed).standard_normal((count, CHANNELS))


def reference(count: int = 100) -> foreign.Reference:
    """Of features around 0 and of masks whose probabilities are 0.8 to 0.9."""
    return foreign.fit(values(0, 500), values(1, count), np.linspace(0.8, 0.9, count))


def segnet() -> keras.Model:
    """A small U-Net."""
    return segmentation.build(DESIGN, SIZE)


def pictures() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture
def toy_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's encoder has one level only."""
    monkeypatch.setattr(foreign, "LEVEL", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("count", [20, 100, 150])
def test_keeps_95_percent_of_validation(count: int) -> None:
    scores = reference(count).scores(values(1, count), np.linspace(0.8, 0.9, count))
    kept = (scores <= reference(count).threshold).mean()
    assert foreign.KEPT <= kept < foreign.KEPT + 1 / count  # the lowest threshold that keeps so many


def test_far_features_and_uncertain_masks_are_each_enough() -> None:
    found = reference()
    center, far = found.mean[None], found.mean[None] + FAR
    above = [
        found.scores(features, np.array([inside]))[0] > found.threshold
        for features, inside in ((center, 0.85), (far, 0.85), (center, 0.4), (center, 0.0))
    ]
    assert above == [False, True, True, True]


def test_distance_counts_standard_deviations_not_units() -> None:
    """A step along the direction in which training images differ most is the smaller one."""
    train = values(0, 1000) * ([10] + (CHANNELS - 1) * [1])
    found = foreign.fit(train, train, np.linspace(0.8, 0.9, 1000))
    steps = np.eye(CHANNELS)[:2] * 9
    wide, narrow = foreign.measures(found.mean, found.precision, found.mean + steps, np.full(2, 0.85))[:, 0]
    assert np.exp(wide) == pytest.approx(0.81, rel=0.1) and np.exp(narrow) == pytest.approx(81, rel=0.1)


def test_probability_counts_inside_the_mask_only() -> None:
    probability, masks = np.zeros((2, 2, 2, 1)), np.zeros((2, 2, 2, 1), np.uint8)
    probability[0, 0, :, 0], masks[0, 0] = (0.5, 1.0), 1
    assert foreign.probability_inside(probability, masks).tolist() == [0.75, 0]  # the second mask is empty


@pytest.mark.usefixtures("toy_level")
def test_features_are_means_of_the_maps() -> None:
    network, images = segnet(), pictures().astype(np.float32)
    encoder = network.get_layer(toy.NAME)
    maps = encoder.predict_on_batch(toy.preprocess(images))
    features = foreign.feature_model(network, asdict(DESIGN)).predict_on_batch(images)
    assert features == pytest.approx(maps.mean(axis=(1, 2)), rel=1e-4)


@pytest.mark.usefixtures("toy_level")
def test_is_saved_with_the_networks_it_belongs_to(folder: Path) -> None:
    assert foreign.load(segnet(), SETTINGS) == (None, "")
    saved = reference()
    foreign.save(saved, SETTINGS)
    detector, checksum = foreign.load(segnet(), SETTINGS)
    assert detector is not None and checksum == sha256(folder / foreign.FILE)
    features, inside = values(3, 5, 1), np.linspace(0.5, 0.9, 5)
    assert np.array_equal(detector.reference.scores(features, inside), saved.scores(features, inside))
    assert detector.reference.threshold == saved.threshold
    assert foreign.load(segnet(), SETTINGS | {"sha256": {"segnet.weights.h5": "b"}}) == (None, "")
    (folder / foreign.FILE).write_bytes((folder / foreign.FILE).read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged"):
        foreign.load(segnet(), SETTINGS)


def test_shipped_description_belongs_to_the_shipped_network_and_is_small() -> None:
    (network,), settings = pretrained.load_segnet(SIZE)
    detector, _ = foreign.load(network, settings)
    assert detector is not None
    assert detector.features.output_shape[1:] == detector.reference.mean.shape
    assert (pretrained.FOLDER / foreign.FILE).stat().st_size < 300_000


def toy_networks(threshold: float | None) -> Pipeline:
    """A pipeline of toys, without a detector or with one of this threshold."""
    network, members = segnet(), [classifier.build(BACKBONE, SIZE, backbones.NONE)]
    detector = None
    if threshold is not None:
        found = reference()
        values = (found.mean, found.precision, found.center, found.scale, np.array(threshold))
        detector = foreign.Detector(foreign.feature_model(network, asdict(DESIGN)), foreign.Reference(*values))
    return Pipeline(
        SIZE,
        Segmenter([network], 0.5, MaskOptions(1, True, 2)),
        "crop",
        SIZE,
        ensemble.Blend([ensemble.Ensemble(members, [""], 1)]),
        {"melanoma": {"0.5": 0.5}},
        {},
        detector,
    )


def read(*flags: str) -> list[Read]:
    """The pictures, with these flags of their files."""
    return [Read(ImageFile(Path(), "a"), one, one, (SIZE, SIZE), flags, ("a", "")) for one in pictures()]


def found_flags(threshold: float | None, *flags: str) -> list[list[str]]:
    """Flags of the pictures by `toy_networks`."""
    return [[*one.flags] for one in toy_networks(threshold).find(read(*flags), explain=False)]


@pytest.mark.usefixtures("toy_level")
def test_flag_follows_those_of_the_file() -> None:
    assert found_flags(-np.inf, "small") == 3 * [["small", foreign.FLAG]]
    assert found_flags(np.inf, "small") == 3 * [["small"]]
    assert found_flags(None) == 3 * [[]]


@pytest.mark.usefixtures("toy_level")
@pytest.mark.skipif(bool(openvino.obstacle()), reason=openvino.obstacle())
def test_all_networks_of_a_prepared_pipeline_compute_by_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, engines = toy_networks(0), []
    networks.warm_up()
    monkeypatch.setattr(openvino, "log_choice", lambda name, reason: engines.append(name))
    networks.find(read()[:1], explain=True)
    assert engines == 4 * ["openvino float32"]  # segmentation, classifier, flag, Grad-CAM


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the images of the challenge are absent")
def test_real_validation_images_are_kept_and_altered_ones_flagged() -> None:
    networks = pipeline.from_pretrained(backbone="mobilenetv2")
    assert networks.detector is not None
    paths = sorted((SHARED / "ISIC-2017_Validation_Data").glob("*.jpg"))[::5]
    images = np.stack([decode.read_pair(path, None, networks.size).image for path in paths])
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    scores = []
    for kind in (images, noise, images // 12):
        lesion = np.concatenate(list(networks.segmenter.probabilities(kind, "")))
        scores.append(networks.detector.scores(kind, lesion, networks.segmenter.segment(lesion)))
    kept, *others = scores
    threshold = networks.detector.reference.threshold
    assert (kept <= threshold).mean() >= 0.85
    for other in others:
        assert (other > threshold).all()
        assert roc_auc_score(np.repeat([0, 1], len(paths)), np.concatenate([kept, other])) > 0.98
