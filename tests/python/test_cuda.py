"""The operators on CUDA tensors: the same code, the same promises."""

import pytest
import torch
from ffn_cases import dense, make_block, reference, relative_error
from test_accumulate import check_parts, old_gradients

import twell
from twell import functional

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels():
    try:
        twell.plan(64, 128, 10, path="twell", device="cuda")
    except RuntimeError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("density", [0.0, 0.005, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 256, 1024), (129, 264, 1000), (700, 128, 512)], ids=str)
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_forward(kind, shape, density):
    block = make_block(*shape, kind=kind, density=density)
    expected, _, _ = reference(block)
    on_device = block.to("cuda")
    y, l0, _, activity, _ = torch.ops.twell.ffn_forward(*on_device.operands, False)
    error = relative_error(y.cpu(), expected)
    assert error <= 1.1 * relative_error(dense(on_device).cpu(), expected) + 1e-12
    assert l0.is_cuda and l0 == activity.sum()


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_opcheck(kind):
    block = make_block(37, 64, 136, kind=kind).to("cuda")
    torch.library.opcheck(torch.ops.twell.ffn_forward, (*block.operands, False))
    torch.library.opcheck(torch.ops.twell.ffn_forward, (*block.operands, False, False))
    saved = torch.ops.twell.ffn_forward(*block.operands, True)[4]
    grads = torch.randn_like(block.x), torch.tensor(0.25, device="cuda")
    arguments = (*grads, *block.operands, saved)
    torch.library.opcheck(torch.ops.twell.ffn_backward, arguments)
    torch.library.opcheck(
        torch.ops.twell.ffn_backward_accumulate, (*arguments, *old_gradients(block))
    )


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_accumulated_parts_add_up_to_the_whole(kind, density):
    check_parts(make_block(700, 128, 512, kind=kind, density=density).to("cuda"), parts=3)


def test_gate_pack_opcheck():
    block = make_block(37, 64, 264).to("cuda")
    torch.library.opcheck(torch.ops.twell.gate_pack, (block.x, block.gate, 16))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(20, 264, 1000), (700, 128, 512)], ids=str)
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_gradients(kind, shape, density):
    block = make_block(*shape, kind=kind, density=density)
    grad_y = torch.randn_like(block.x)

    def gradients(block, path):
        leaves = [t.detach().requires_grad_() for t in block.operands if t is not None]
        out = (functional.ffn if kind == "plain" else functional.gated_ffn)(*leaves, path=path)
        y_part = (out.y * grad_y.to(out.y)).sum(dtype=torch.float64)
        found = torch.autograd.grad(y_part + 0.25 * out.l1, leaves)
        return [gradient.cpu() for gradient in found]

    exact = gradients(block.to(torch.float64), "dense")
    on_device = block.to("cuda")
    found, rival = (gradients(on_device, path) for path in ("twell", "dense"))
    for ours, dense_one, expected in zip(found, rival, exact, strict=True):
        allowed = 1.1 * relative_error(dense_one, expected)
        assert relative_error(ours, expected) <= allowed + 1e-12


@pytest.mark.parametrize("path", ["twell", "auto"])
def test_compile_without_graph_breaks(path):
    ffn = twell.GatedFFN(256, 1024, path=path, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(700, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def loss(x):
        return ffn(x).square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    inputs = [x, *ffn.parameters()]
    want, found = (torch.autograd.grad(run(x), inputs) for run in (loss, compiled))
    for a, b in zip(found, want, strict=True):
        assert relative_error(a, b.double()) <= 0.02


def test_the_current_stream_is_used():
    block = make_block(700, 256, 1024).to("cuda")
    expected = torch.ops.twell.ffn_forward(*block.operands, False)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = block.x.clone().mul_(1)  # ready only when the stream gets there
        y = torch.ops.twell.ffn_forward(late, *block.operands[1:], False)[0]
    stream.synchronize()
    assert torch.equal(y, expected)


def test_devices_may_not_mix():
    block = make_block(4, 64, 136)
    with pytest.raises(RuntimeError, match="up is on cpu; it must be on the device of x, cuda:0"):
        torch.ops.twell.ffn_forward(block.x.cuda(), *block.operands[1:], False)


@pytest.fixture
def auto_block():
    torch.manual_seed(0)
    return twell.GatedFFN(256, 1024, dtype=torch.bfloat16, device="cuda")


def test_auto_follows_the_density_without_waiting(auto_block):
    x = torch.randn(700, 256, device="cuda").bfloat16()
    with torch.no_grad():
        auto_block(x)  # before anything is measured
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(40):
                auto_block(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    active, union = auto_block._expected
    assert 450 < auto_block.mean_active.item() <= active <= 1024
    assert 1000 < auto_block.mean_union.item() <= union <= 1024


def test_a_captured_block_measures_in_every_replay(auto_block):
    x = torch.randn(700, 256, device="cuda").bfloat16()
    with torch.no_grad():
        for _ in range(3):
            auto_block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            auto_block(x)
        auto_block.gate.zero_()
        for _ in range(20):
            graph.replay()
    auto_block.replan()
    assert auto_block.mean_active.item() < 1 and auto_block._expected[0] <= 1
    assert auto_block._calls == 3
