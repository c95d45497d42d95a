"""The diagrams of the networks."""

from pathlib import Path

from melanoma.models import classifier, segmentation
from tools import schematics

import pytest
from matplotlib.image import imread


def test_every_convolution_and_pooling_of_segnet_is_drawn() -> None:
    design = segmentation.Design("segnet", 64, mean=[128.0] * 3, std=[60.0] * 3)
    slabs = list(schematics.list_slabs(segmentation.build(design, 96)))
    convolutions = [slab for slab in slabs if slab.meaning == "conv 3\N{MULTIPLICATION SIGN}3 + batch norm + ReLU"]
    assert len(convolutions) == 2 * sum(count for _, count in segmentation.ENCODER)
    assert [slab.side for slab in slabs if slab.name.endswith("pool")] == [32, 16, 8]
    assert (slabs[0].side, slabs[-1].side) == (96, 96)


def test_steps_of_the_head_have_its_units() -> None:
    steps = list(schematics.list_steps(classifier.build_head(8)))
    assert [(step.text, step.shape) for step in steps] == [
        ("dense, ReLU", (1024,)),
        ("dropout 0.6", (1024,)),
        ("dense, softmax", (3,)),
    ]


def test_diagram_of_segnet_is_written(tmp_path: Path) -> None:
    path = tmp_path / "graphics" / "segnet_schematic.png"
    schematics.draw_segnet(path)
    assert imread(path).std() > 0


@pytest.mark.slow
def test_diagram_of_the_classifier_is_written(tmp_path: Path) -> None:
    path = tmp_path / "graphics" / "densenet_flow.png"
    schematics.draw_classifier(path)
    assert imread(path).std() > 0
