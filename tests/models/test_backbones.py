"""Backbones by name, their preprocessing, and their weights."""

import argparse
import sys
from pathlib import Path

from melanoma.artifacts.atomic import sha256
from melanoma.errors import InputError
from melanoma.models import backbones, classifier, segmentation

import keras
import numpy as np
import pytest
import toy
import toy_training

SIZE = 32

toy.register()


def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.float32)


def batchnorm_layers(model: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the toy backbone."""
    keras.utils.set_random_seed(1)
    path = tmp_path_factory.mktemp("weights") / "toy.weights.h5"
    backbones.build("toy", SIZE, "none").save_weights(path)
    return path


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mobilenet_v2", "mobilenetv2"),
        ("MobileNetV2", "mobilenetv2"),
        ("densenet121", "densenet121"),
        ("DenseNet-121", "densenet121"),
        ("efficientnet_lite0", "efficientnetlite0"),
        ("mobilenet_0.75", "mobilenet0.75"),
    ],
)
def test_backbone_has_several_spellings(text: str, name: str) -> None:
    assert backbones.backbone_name(text) == name


def test_unknown_backbone_is_refused_with_the_known_names() -> None:
    with pytest.raises(InputError, match=r"'mobilenet_v9'.*mobilenetv2"):
        backbones.backbone_name("mobilenet_v9")


def test_flags_have_the_defaults_given() -> None:
    parser = argparse.ArgumentParser()
    backbones.add_flags(parser, "mobilenetv2")
    assert vars(parser.parse_args([])) == {"backbone": "mobilenetv2", "weights": "imagenet", "scaling": None}
    assert parser.parse_args(["--backbone", "DenseNet-121"]).backbone == "densenet121"


# -------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    ("name", "scaling", "expected"),
    [
        ("mobilenet", None, [[-1, 0, 1]]),  # -1 to 1
        ("vgg16", None, [[255 - 103.939, 127.5 - 116.779, -123.68]]),  # BGR minus its mean
        ("densenet121", None, [[-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]]),  # standardised RGB
        ("mobilenet", "torch", [[-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]]),
        ("efficientnetb0", None, [[0, 127.5, 255]]),  # scales inside the backbone
        ("efficientnet_lite0", None, [[-127 / 128, 0.5 / 128, 1]]),
    ],
)
def test_preprocessing_is_that_of_the_backbone_or_as_asked(
    name: str, scaling: str | None, expected: list[list[float]]
) -> None:
    image = keras.ops.convert_to_tensor(np.array([0, 127.5, 255], np.float32).reshape(1, 1, 1, 3))
    found = np.asarray(backbones.preprocess(backbones.backbone_name(name), image, scaling)).reshape(1, 3)
    assert found == pytest.approx(np.array(expected), abs=1e-4)


def test_image_too_small_for_the_backbone_is_refused() -> None:
    with pytest.raises(InputError, match="mobilenet with images of 16 pixels"):
        backbones.build("mobilenet", 16, "none")


# -------------------------------------------------------------------------------------------------------------- weights


def test_weight_file_gives_the_features_of_the_model_that_wrote_it(weight_file: Path) -> None:
    images = random_images()
    keras.utils.set_random_seed(1)
    expected = backbones.build("toy", SIZE, "none", pooling="avg").predict_on_batch(images)
    keras.utils.set_random_seed(2)
    loaded, other = (backbones.build("toy", SIZE, weights, pooling="avg") for weights in (str(weight_file), "none"))
    assert loaded.predict_on_batch(images) == pytest.approx(expected, rel=1e-5)
    assert other.predict_on_batch(images) != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("whole", ["classifier", "unet"])
def test_weights_are_those_of_the_backbone_inside_a_network_trained_here(whole: str, tmp_path: Path) -> None:
    path = tmp_path / "whole.weights.h5"
    if whole == "classifier":
        network = classifier.build("toy", SIZE, "none")
        network.model.save_weights(path)
        inside = network.backbone
    else:
        model = segmentation.build(segmentation.Design("unet", SIZE, "toy"), SIZE)
        model.save_weights(path)
        (inside,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    assert toy_training.same_weights(backbones.build("toy", SIZE, str(path), pooling="avg"), inside)


def build_whole(network: str) -> keras.Model:
    """A classifier, or a segmentation network, with random weights that differ from call to call."""
    if network in ("segnet", "segnet_vgg16", "unet"):
        return segmentation.build(segmentation.Design(network, SIZE, "mobilenetv2", mean=[128] * 3, std=[50] * 3), SIZE)
    return classifier.build(network, SIZE, "none").model


@pytest.mark.parametrize("network", ["efficientnetb0", "mobilenetv2", "densenet121", "unet", "segnet", "segnet_vgg16"])
def test_weights_are_loaded_as_by_keras(network: str, tmp_path: Path) -> None:
    path, (saved, ours, theirs) = tmp_path / "whole.weights.h5", (build_whole(network) for _ in range(3))
    saved.save_weights(path)
    assert not toy_training.same_weights(ours, saved)
    backbones.load_weights(ours, path)
    theirs.load_weights(path)
    assert toy_training.same_weights(ours, saved) and toy_training.same_weights(ours, theirs)


def test_batch_normalisation_is_trained_only_from_random_weights(weight_file: Path) -> None:
    (frozen,) = batchnorm_layers(backbones.build("toy", SIZE, str(weight_file)))
    (free,) = batchnorm_layers(backbones.build("toy", SIZE, "none"))
    assert not frozen.trainable and frozen.trainable_weights == []
    assert free.trainable and len(free.trainable_weights) == 2
    assert frozen.momentum == free.momentum == backbones.BATCHNORM_MOMENTUM


@pytest.mark.parametrize("weights", ["none", "{file}"])
@pytest.mark.parametrize("trained", [True, False])
def test_batch_normalisation_is_trained_or_frozen_as_asked(weights: str, trained: bool, weight_file: Path) -> None:
    (layer,) = batchnorm_layers(backbones.build("toy", SIZE, weights.format(file=weight_file), train_batchnorm=trained))
    assert len(layer.trainable_weights) == 2 * trained


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_weights_of_another_architecture_are_refused(weight_file: Path) -> None:
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="dense")
    with pytest.raises(InputError, match=r"toy\.weights\.h5 does not fit dense"):
        backbones.load_weights(other, weight_file)


@pytest.mark.filterwarnings("ignore:.*HDF5 file via:UserWarning")
def test_full_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    backbones.build("toy", SIZE, "none").save(path)
    with pytest.raises(InputError, match=r"model\.h5 does not fit toy: it holds a full model"):
        backbones.build("toy", SIZE, str(path))


def test_damaged_weight_file_is_refused(weight_file: Path, tmp_path: Path) -> None:
    truncated, noise = tmp_path / "truncated.weights.h5", tmp_path / "noise.weights.h5"
    truncated.write_bytes(weight_file.read_bytes()[: weight_file.stat().st_size // 2])
    noise.write_bytes(bytes(range(256)) * 8)
    for path in (truncated, noise):
        with pytest.raises(InputError, match="does not fit toy"):
            backbones.build("toy", SIZE, str(path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "bad.weights.h5"
    model = backbones.build("toy", SIZE, "none")
    kernel = model.get_layer("conv").get_weights()[0]
    kernel[0, 0, 0, 0] = value
    model.get_layer("conv").set_weights([kernel])
    model.save_weights(path)
    with pytest.raises(InputError, match=r"bad\.weights\.h5: weights of toy are NaN or infinite"):
        backbones.build("toy", SIZE, str(path))


def test_missing_weight_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give a file, imagenet or none"):
        backbones.build("toy", SIZE, str(tmp_path / "missing.weights.h5"))


def test_name_of_a_weight_file_must_end_in_h5(weight_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(weight_file.read_bytes())
    with pytest.raises(InputError, match=r"weights\.npz: the name of a weight file ends in \.h5 or \.hdf5"):
        backbones.build("toy", SIZE, str(path))


def test_fingerprint_is_that_of_the_file_or_the_flag_itself(weight_file: Path) -> None:
    assert backbones.weights_fingerprint(str(weight_file)) == sha256(weight_file)
    assert backbones.weights_fingerprint("imagenet") == "imagenet"


def test_layers_of_nested_models_are_listed() -> None:
    network = classifier.build("toy", SIZE, "none")
    names = [layer.name for layer in backbones.flatten_layers(network.model)]
    assert {"images", "conv", "norm", "dense", "classes"} <= set(names)
    assert not {network.backbone.name, network.head.name} & set(names)


# ------------------------------------------------------------------------------------------------------------ downloads


def get_file(name: str, origin: Path, cache: Path, **options: str) -> str:
    """Downloads as `keras.applications` does."""
    module = sys.modules[keras.utils.get_file.__module__]
    return module.get_file(name, origin.as_uri(), cache_dir=cache, cache_subdir="models", **options)


def test_downloaded_weight_files_are_listed(weight_file: Path, tmp_path: Path) -> None:
    with backbones.downloads() as taken:
        path = get_file("toy.h5", weight_file, tmp_path)
    assert taken == [Path(path)] == [tmp_path / "models" / "toy.h5"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "whose checksum is not known"), ({"file_hash": "0123", "hash_algorithm": "md5"}, "with checksum 0123")],
)
def test_failed_download_names_what_was_expected(options: dict[str, str], expected: str, tmp_path: Path) -> None:
    origin = tmp_path / "missing.h5"
    with pytest.raises(InputError, match=f"{origin.as_uri()}, {expected}, in .*--weights none"), backbones.downloads():
        get_file("toy.h5", origin, tmp_path, **options)


def test_keras_downloads_as_usual_afterwards() -> None:
    before = sys.modules[keras.utils.get_file.__module__].get_file
    with pytest.raises(ZeroDivisionError), backbones.downloads():
        raise ZeroDivisionError
    assert sys.modules[keras.utils.get_file.__module__].get_file is before
