"""Two processes (gloo) with DDP or FSDP2 train as one process does."""

import pytest
import torch
from distributed_worker import WORLD, make_model, train, worker


@pytest.mark.parametrize("path", ["auto", "twell"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(how, path, tmp_path):
    result = str(tmp_path / "result.pt")
    arguments = (str(tmp_path / "store"), how, path, result)
    torch.multiprocessing.spawn(worker, arguments, nprocs=WORLD)
    losses, state = torch.load(result)

    alone = make_model(path)
    assert losses == pytest.approx(train(alone, 0, 1), rel=1e-12)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(state[name], tensor, msg=name)
