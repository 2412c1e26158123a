"""Weighting, model calls and the errors that bad data get."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hessian
from hessian.objective import batches_of
from tests.cases import SmoothNet, classification, seeded


def mean_loss(objective: hessian.Objective) -> float:
    return sum(
        weight * float(objective.batch_loss(objective.outputs(batch), batch)) for batch, weight in objective.weighted_batches()
    )


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)),
    "weights, one ignored": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64), ignore_index=0),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "function": nn.functional.cross_entropy,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("split", [(8, 2), (3, 3, 4), (1, 9)])
def test_batches_add_up_to_the_loss_of_the_whole(loss, split):
    model = seeded(SmoothNet)
    inputs, targets = classification(10, 4)
    batches = list(zip(inputs.split(split), targets.split(split), strict=True))
    whole = float(loss(model(inputs), targets).detach())
    assert mean_loss(hessian.Objective(model, loss, batches)) == pytest.approx(whole, rel=1e-12)


def test_a_batch_without_a_counting_item_does_not_count():
    model = seeded(SmoothNet)
    inputs, targets = classification(6, 4)
    targets[:3] = 2
    targets[3:] = 1
    loss = nn.CrossEntropyLoss(ignore_index=2)
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    assert mean_loss(hessian.Objective(model, loss, batches)) == pytest.approx(float(loss(model(inputs), targets)), rel=1e-12)
    with pytest.raises(ValueError, match="the loss ignores every target"):
        mean_loss(hessian.Objective(model, loss, batches[:1]))


def test_dict_batches_by_forward_and_items():
    model = seeded(SmoothNet)
    inputs, targets = classification(5, 4)
    batches = [{"x": inputs[:4], "y": targets[:4]}, {"x": inputs[4:], "y": targets[4:]}]
    objective = hessian.Objective(
        model,
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["y"]),
        batches,
        forward=lambda network, batch: network(batch["x"]),
        items=lambda batch: len(batch["y"]),
    )
    expected = float(nn.functional.cross_entropy(model(inputs), targets))
    assert mean_loss(objective) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(TypeError, match="say how to call the model"):
        mean_loss(hessian.Objective(model, nn.CrossEntropyLoss(), batches))


def test_loader_is_reiterable_and_leaves_the_generator_alone():
    data = TensorDataset(*classification(10, 4))
    state = torch.get_rng_state()
    loader = batches_of(data, 4)
    assert [len(batch[0]) for batch in loader] == [4, 4, 2]
    assert [len(batch[0]) for batch in loader] == [4, 4, 2]
    assert torch.equal(torch.get_rng_state(), state)
    subset = batches_of(data, 4, size=5, generator=torch.Generator().manual_seed(0))
    again = batches_of(data, 4, size=5, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(subset, again, strict=True))
    assert sum(len(batch[0]) for batch in subset) == 5


def test_bad_data():
    model, loss = seeded(SmoothNet), nn.CrossEntropyLoss()
    inputs, targets = classification(4, 4)
    with pytest.raises(ValueError, match="empty on the second pass"):
        hessian.Objective(model, loss, iter([(inputs, targets)]))
    with pytest.raises(ValueError, match="the data is empty"):
        mean_loss(hessian.Objective(model, loss, []))
    with pytest.raises(ValueError, match="target 3 is out of range: the model has 3 outputs"):
        mean_loss(hessian.Objective(model, loss, (inputs, torch.tensor([0, 1, 3, 2]))))
    with pytest.raises(ValueError, match=r"target -1 is out of range"):
        mean_loss(hessian.Objective(model, loss, (inputs, torch.tensor([0, 1, -1, 2]))))
    broken = inputs.clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="tensor 0 of a batch holds NaN or Inf, first in its example 2"):
        mean_loss(hessian.Objective(model, loss, (broken, targets)))
    with pytest.raises(ValueError, match="not one value"):
        mean_loss(hessian.Objective(model, nn.CrossEntropyLoss(reduction="none"), (inputs, targets)))
    with torch.no_grad():
        model.last.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'last\.weight' of the model holds NaN or Inf"):
        mean_loss(hessian.Objective(model, loss, (inputs, targets)))


def test_items_and_losses_that_make_no_sense():
    model, data = seeded(SmoothNet), classification(4, 4)
    for value in (math.nan, -1.0, math.inf):
        with pytest.raises(ValueError, match="a finite number, at least 0"):
            mean_loss(hessian.Objective(model, nn.CrossEntropyLoss(), data, items=lambda _, value=value: value))
    with pytest.raises(TypeError, match="the loss returned a float"):
        mean_loss(hessian.Objective(model, lambda outputs, targets: float(outputs.sum() * targets.sum()), data))


def test_data_loader_batches_are_accepted():
    model, loss = seeded(SmoothNet), nn.CrossEntropyLoss()
    data = classification(10, 4)
    loader = DataLoader(TensorDataset(*data), batch_size=3, generator=torch.Generator())
    assert mean_loss(hessian.Objective(model, loss, loader)) == pytest.approx(float(loss(model(data[0]), data[1])), rel=1e-12)
