"""Domain-parallel layers against one process, in float64: values, gradients, Hessian-vector products."""

import itertools
import math
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from parallel.halo import fetch, partition, row_exchange
from parallel.layouts import domain
from parallel.layouts.batch_norm import GlobalBatchNorm
from parallel.layouts.domain import Tiles, Window
from parallel.layouts.replicated import summed, used_in_parts
from parallel.linear_map import linear_map
from parallel.overlapped import OverlappedFetch
from tests.ranks import run_on_ranks

CONVOLUTIONS = [  # height and width, kernel, stride, padding, dilation, groups
    ((11, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((13, 8), (5, 3), (2, 1), (2, 0), (1, 1), 2),
    ((17, 19), (3, 5), (3, 2), (0, 2), (2, 1), 1),
    ((9, 8), (7, 1), (1, 1), (3, 0), (1, 1), 4),  # a window that reaches over several ranks
    ((14, 9), (2, 2), (4, 4), (0, 0), (1, 1), 1),  # rows that nobody sees
    ((8, 8), (3, 3), (1, 1), (4, 1), (1, 1), 1),  # outputs that see nothing but the border
    ((8, 6), (1, 1), (2, 2), (0, 0), (1, 1), 1),  # nobody needs another's rows
]


def data(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def derivatives(loss, leaves):
    """Value, gradients and one Hessian-vector product."""
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    directions = [data(*leaf.shape, seed=7 + index) for index, leaf in enumerate(leaves)]
    along = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    products = torch.autograd.grad(along, leaves)
    return [loss.detach(), *(gradient.detach() for gradient in gradients), *products]


def tilings(size):
    """Rows, columns and, on four ranks, both."""
    ranks = distributed.get_world_size()
    grids = [(ranks, 1), (1, ranks)] + ([(2, 2)] if ranks == 4 else [])
    return [Tiles(size, grid) for grid in grids]


def windows():
    """Every convolution, divided and whole: the same outputs, gradients and products."""
    worst = 0.0
    for size, kernel, stride, padding, dilation, groups in CONVOLUTIONS:
        x, weight, bias = data(2, 4, *size), data(4, 4 // groups, *kernel, seed=1), data(4, seed=2)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
        whole = F.conv2d(x, weight, bias, **options)
        expected = derivatives(whole.sin().sum(), leaves)
        for tiles in tilings(size):
            if whole.shape[2] < tiles.grid[0] or whole.shape[3] < tiles.grid[1]:
                with pytest.raises(ValueError, match="too few"):
                    domain.conv2d(tiles.shard(x), tiles, weight, bias, **options)
                continue
            image, *parameters = (used_in_parts(leaf) for leaf in leaves)
            part, outputs = domain.conv2d(tiles.shard(image), tiles, *parameters, **options)
            assert outputs.size == whole.shape[2:]
            worst = max(worst, float((part - outputs.shard(whole)).detach().abs().max()))
            found = derivatives(summed(part.sin().sum()), leaves)
            worst = max(worst, *(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)))
            pooled, outputs = domain.max_pool2d(tiles.shard(x), tiles, (3, 2), stride=(2, 2), padding=(1, 0))
            assert torch.equal(pooled, outputs.shard(F.max_pool2d(x, (3, 2), (2, 2), (1, 0))))
    return worst


def enlarged():
    """Interpolation, divided and whole."""
    worst = 0.0
    x = data(2, 3, 9, 7).requires_grad_()
    for mode, factor in itertools.product(("nearest", "bilinear"), ((2, 2), (3, 1), (4, 3))):
        whole = F.interpolate(x, [9 * factor[0], 7 * factor[1]], mode=mode)
        expected = derivatives(whole.sin().sum(), [x])
        for tiles in tilings((9, 7)):
            part, outputs = domain.upsample(tiles.shard(used_in_parts(x)), tiles, factor, mode)
            worst = max(worst, float((part - outputs.shard(whole)).detach().abs().max()))
            found = derivatives(summed(part.sin().sum()), [x])
            worst = max(worst, *(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)))
    return worst


def network(x, targets, leaves, tiles=None):
    """Convolutions, batch norm, pooling and a head, of whole images or of this rank's tile of them."""
    first, scale, shift, second, head = leaves
    if tiles is None:
        x = F.conv2d(x, first, stride=2, padding=2).tanh()
        x = F.batch_norm(x, None, None, scale, shift, training=True)
        x = F.max_pool2d(x, (3, 3), (1, 1), (1, 1))
        x = F.conv2d(x, second, padding=(3, 1), dilation=(2, 1)).sigmoid()
        return F.cross_entropy(x.mean((2, 3)) @ head, targets)
    first, scale, shift, second = (used_in_parts(leaf) for leaf in (first, scale, shift, second))
    norm = GlobalBatchNorm(6, affine=False, track_running_stats=False)
    x, tiles = domain.conv2d(tiles.shard(x), tiles, first, stride=(2, 2), padding=(2, 2))
    x = norm(x.tanh()) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    x, tiles = domain.max_pool2d(x, tiles, (3, 3), stride=(1, 1), padding=(1, 1))
    x, tiles = domain.conv2d(x, tiles, second, padding=(3, 1), dilation=(2, 1))
    mean = summed(x.sigmoid().sum((2, 3))) / math.prod(tiles.size)
    return F.cross_entropy(mean @ head, targets)


def problem():
    leaves = [data(6, 3, 5, 5, seed=1), data(6, seed=2), data(6, seed=3), data(4, 6, 4, 3, seed=4), data(4, 5, seed=5)]
    return data(3, 3, 19, 14), torch.tensor([0, 3, 4]), [leaf.requires_grad_() for leaf in leaves]


def trained():
    x, targets, leaves = problem()
    return [derivatives(network(x, targets, leaves, tiles), leaves) for tiles in tilings((19, 14))]


def adjoint():
    """<fetch x, y> = <x, its adjoint y>, summed over ranks, for random ranges; and fetching is the adjoint's derivative."""
    ranks, rank, worst = distributed.get_world_size(), distributed.get_rank(), 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        owned = partition(int(torch.randint(1, 12, (), generator=generator)), ranks)
        total = owned[-1][1]
        needed = tuple(tuple(sorted(torch.randint(0, total + 1, (2,), generator=generator).tolist())) for _ in range(ranks))
        exchange = row_exchange(owned, needed, 1)
        whole = data(2, total, 3)
        own = whole[:, slice(*owned[rank])].clone().requires_grad_()
        found = fetch(own, exchange)
        assert torch.equal(found, whole[:, slice(*needed[rank])])
        weights = data(*found.shape, seed=rank).requires_grad_()
        (gradient,) = torch.autograd.grad(found, own, weights, create_graph=True)
        inner = torch.stack([(found * weights).sum(), (own * gradient).sum()]).detach()
        distributed.all_reduce(inner)
        worst = max(worst, float((inner[0] - inner[1]).abs()))
        (again,) = torch.autograd.grad(gradient, weights, own.detach())
        assert torch.equal(again, found)
    return worst


def group_of_two():
    """Rows divided within each of two groups, of which only one holds rank 0."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    rank = distributed.get_rank()
    tiles = Tiles.of_rows((9, 5), groups[rank // 2])
    x, weight = data(1, 2, 9, 5, seed=rank // 2), data(3, 2, 3, 3)
    part, outputs = domain.conv2d(tiles.shard(x), tiles, weight, padding=(1, 1))
    return float((part - outputs.shard(F.conv2d(x, weight, padding=1))).abs().max())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_windows_equal_those_of_whole_images(ranks):
    assert max(run_on_ranks(windows, ranks)) < 1e-11


@pytest.mark.parametrize("ranks", [2, 4])
def test_interpolation_equals_that_of_whole_images(ranks):
    assert max(run_on_ranks(enlarged, ranks)) < 1e-12


def test_outputs_that_see_some_inputs_alone():
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 4), (1, 2)):
        window = Window(kernel, stride, padding, dilation)
        outputs, inputs = (0, window.outputs(20)), (4, 13)
        seen = {one: window.seen((one, one + 1)) for one in range(*outputs)}
        inside = [one for one, (start, end) in seen.items() if start >= 4 and end <= 13]
        assert list(range(*window.within(outputs, inputs))) == inside


def order_of_work():
    """What happens in which order, in a forward pass, a backward pass, and one through that."""
    events = []

    class Watched(OverlappedFetch):
        def send(self, blocks, exchanges):
            events.append("sent")
            super().send(blocks, exchanges)

        def received(self):
            events.append("received")
            return super().received()

    def pooled(x):
        events.append(x.shape[2])
        return x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]

    def spread(gradient):
        events.append(gradient.shape[2] + 2)
        return sum(F.pad(gradient, (0, 0, before, 2 - before)) for before in range(3))

    tiles = Tiles.of_rows((16, 3))
    with mock.patch.object(domain, "OverlappedFetch", Watched):
        x = tiles.shard(data(1, 1, 16, 3)).requires_grad_()
        part, _ = domain.windowed(x, tiles, (Window(3, 1, 1), Window(1)), lambda rows, _: linear_map(rows, pooled, spread))
        (gradient,) = torch.autograd.grad(part.pow(3).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.sum(), x)
    return events


def test_messages_are_under_way_while_the_interior_is_computed():
    for events in run_on_ranks(order_of_work, 2):
        assert [events[first : first + 3] for first, event in enumerate(events) if event == "sent"] == [
            ["sent", 8, "received"]
        ] * 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_network_has_the_loss_gradient_and_product_of_one_process(ranks):
    x, targets, leaves = problem()
    expected = derivatives(network(x, targets, leaves), leaves)
    results = run_on_ranks(trained, ranks)
    for found, truth in itertools.chain.from_iterable(zip(one, expected, strict=True) for result in results for one in result):
        assert float((found - truth).abs().max()) < 1e-10 * max(1.0, float(truth.abs().max()))
    assert all(torch.equal(one, other) for one, other in zip(results[0][0], results[-1][0], strict=True))


def test_fetching_and_its_adjoint():
    assert max(run_on_ranks(adjoint, 3)) < 1e-12


def test_groups_of_some_ranks():
    assert max(run_on_ranks(group_of_two, 4)) < 1e-12


def test_partitions_are_even():
    assert partition(10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))
    assert partition(2, 3) == ((0, 1), (1, 2), (2, 2))


def refusals():
    for owned, needed, message in (
        (((0, 4),), ((0, 4),), "1 ranges are owned by 2 ranks"),
        (((0, 4), (5, 6)), ((0, 4), (0, 4)), "not consecutive"),
        (((0, 4), (4, 6)), ((0, 4), (0, 7)), "rank 1 needs rows 0 to 7 of 6"),
    ):
        with pytest.raises(ValueError, match=message):
            row_exchange(owned, needed)
    exchange = row_exchange(((0, 4), (4, 6)), ((0, 4), (0, 6)))
    with pytest.raises(ValueError, match="this rank owns rows"):
        fetch(torch.zeros(1, 1, 5, 1), exchange)
    assert [exchange.sent(rank) for rank in range(2)] == [4, 0]


def test_ranges_that_do_not_fit_are_refused():
    run_on_ranks(refusals, 2)
