"""Among which ranks a run divides what: the batch alone, parameters too, or layers by a mesh or a plan."""

import logging
from itertools import groupby
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hessian.processes import Processes
from parallel.communication import AlphaBeta
from parallel.laid_out_replica import LaidOutReplica
from parallel.layer_cost import Layout
from parallel.layouts.choice import Mesh, for_mesh, planned, read_mesh
from parallel.layouts.ghost_batch_norm import use_ghosts
from parallel.replica import Replica, has_unused_parameters
from parallel.train_options import Config

logger = logging.getLogger(__name__)


def arranged(model: nn.Module, example: Any, config: Config, processes: Processes) -> tuple[Replica, int, int]:
    """The model as the config has it, among how many groups of ranks a batch is shared, and the number of this rank's.

    example: a batch of one input. Collective. ValueError for a mesh that is not this world's, or that the model cannot take.
    """
    ranks, kind = processes.world_size, processes.device.type
    sizes = Mesh(ranks) if config.mesh is None else read_mesh(config.mesh, ranks)
    layouts: dict[str, Layout] = {}
    if config.plan is not None:
        grid, layouts = planned(model, example, ranks, config.batch_size, AlphaBeta(config.alpha, config.beta))
        sizes = Mesh(grid.batch, tiles=(grid.model, 1))
        runs = [(layout, [name for name, _ in run]) for layout, run in groupby(layouts.items(), lambda item: item[1])]
        described = ", ".join(f"{names[0]}{f' to {names[-1]}' if len(names) > 1 else ''} by {layout}" for layout, names in runs)
        logger.info("plan: %d x %d ranks, %s", grid.model, grid.batch, described)
    elif sizes.shared > 1:
        layouts = for_mesh(model, example, sizes, config.batch_size)
    if sizes.shared == 1:
        mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("batch",))
        if config.ghost_batch is not None:
            _check_ghosts(config, ranks)
            use_ghosts(model, config.ghost_batch, mesh.get_group())
        unused = ranks > 1 and has_unused_parameters(model, example)
        whole = config.batch_norm == "global" and config.ghost_batch is None
        replica = Replica(model, mesh, shard=config.shard, global_batch_norm=whole, some_unused=unused)
        return replica, ranks, processes.rank
    if config.ghost_batch is not None:
        raise ValueError("--ghost-batch: layers that share ranks by model or domain have moments of the whole batch alone")
    if config.batch_norm != "global":
        raise ValueError("--batch-norm local: layers that share ranks by model or domain have moments of the whole batch alone")
    mesh = init_device_mesh(kind, (sizes.batch, sizes.shared), mesh_dim_names=("batch", "shared"))
    tiles = None if sizes.model > 1 else sizes.tiles
    return LaidOutReplica(model, layouts, mesh, tiles), sizes.batch, mesh.get_local_rank("batch")


def _check_ghosts(config: Config, ranks: int) -> None:
    """Ghosts are the same on any number of ranks where none is divided among several."""
    assert config.ghost_batch is not None
    own = config.batch_size / config.accumulate / ranks
    if own % config.ghost_batch:
        raise ValueError(
            f"--ghost-batch {config.ghost_batch} does not divide the {own:g} examples of a rank's pass: change one of them"
        )
