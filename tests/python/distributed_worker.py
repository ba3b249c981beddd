"""The processes of test_distributed.py: two that train together, compared with one alone."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import twell

WORLD = 2
STEPS = 3


def make_model(path: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"path": path, "dtype": torch.float64}
    return nn.Sequential(
        nn.Linear(32, 64, dtype=torch.float64),
        twell.GatedFFN(64, 136, **sizes),
        twell.FFN(64, 72, **sizes),
        nn.Linear(64, 8, dtype=torch.float64),
    )


def blocks(model: nn.Module) -> list[twell.FFN]:
    return [m for m in model.modules() if isinstance(m, twell.FFN)]


def train(model: nn.Module, rank: int, world: int) -> list[float]:
    """Losses, averaged over the processes, of a few steps; each process takes its share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(16, 32, dtype=torch.float64, generator=generator).chunk(world)[rank]
        y = torch.randn(16, 8, dtype=torch.float64, generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        loss = mse_loss(model(x), y) + 1e-3 * sum(ffn.l1 for ffn in blocks(model)) / len(x)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    for ffn in blocks(model):
        fully_shard(ffn)
    return fully_shard(model)


def worker(rank: int, store: str, how: str, path: str, result: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    init = {"init_method": f"file://{store}", "rank": rank, "world_size": WORLD}
    dist.init_process_group("gloo", timeout=timeout, **init)
    model = wrap(make_model(path), how)
    losses = train(model, rank, WORLD)
    state = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    if rank == 0:
        torch.save((losses, full), result)
    dist.barrier()
    # Without the interpreter's shutdown: one of gloo's threads may still let go of a tensor then,
    # which ends the process with SIGABRT now and then, with FSDP2 of torch.nn.Linear alone too.
    os._exit(0)
