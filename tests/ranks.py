"""Functions run by several gloo ranks, each a process of its own."""

import os
import pickle
import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing

# forked from a process that has imported what takes seconds
multiprocessing.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "hessian", "parallel.train", "hawq"]
)


def _worker(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        result = function(*arguments)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort the interpreter's shutdown


def run_on_ranks(function, world_size, *arguments):
    """What `function(*arguments)`, a module's function, returns on each of `world_size` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, function, arguments)
        multiprocessing.start_processes(_worker, arguments, nprocs=world_size, start_method="forkserver")
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]
