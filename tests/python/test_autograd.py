"""Gradients of the operators: against float64, through torch.compile and checkpointing."""

import pytest
import torch
from ffn_cases import make_block, reference, relative_error
from torch.utils.checkpoint import checkpoint

import twell
from twell import functional

KINDS = ["gated", "plain"]


def run(*operands, path="twell"):
    call = functional.gated_ffn if len(operands) == 4 else functional.ffn
    return call(*operands, path=path)


def present(block):
    return [t for t in block.operands if t is not None]


def gradients(block, grad_y, l1_weight, path="twell"):
    leaves = [t.detach().requires_grad_() for t in present(block)]
    out = run(*leaves, path=path)
    loss = (out.y * grad_y).sum(dtype=torch.float64) + l1_weight * out.l1
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("which", ["y", "l1", "both"])
@pytest.mark.parametrize("path", ["twell", "dense"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 19])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, tokens, path, which, set_threads):
    set_threads(1)  # thousands of tiny calls
    block = make_block(tokens, 8, 16, kind=kind, density=0.37, dtype=torch.float64)

    def call(*operands):
        out = run(*operands, path=path)
        return {"y": (out.y,), "l1": (out.l1,), "both": (out.y, out.l1)}[which]

    leaves = present(block.requires_grad_())
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("shape", [(3, 64, 264), (200, 72, 520)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_the_dense_block(kind, dtype, density, shape):
    errors = {"twell": 0, "dense": 0}
    for _ in range(1 + 40 // shape[0]):  # a few active neurons alone say little
        block = make_block(*shape, kind=kind, density=density, dtype=dtype)
        grad_y = torch.randn(shape[:2]).to(dtype)
        exact = gradients(block.to(torch.float64), grad_y.double(), 0.25, path="dense")
        for path in errors:
            found = gradients(block, grad_y, 0.25, path=path)
            assert all(t.dtype == dtype for t in found)
            squares = [relative_error(*pair) ** 2 for pair in zip(found, exact, strict=True)]
            errors[path] += torch.tensor(squares)
    floor = 64 * torch.finfo(torch.float32).eps
    assert (errors["twell"].sqrt() <= 1.1 * errors["dense"].sqrt() + floor).all()


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(kind, set_threads):
    block = make_block(300, 64, 520, kind=kind, density=0.05)
    grad_y = torch.randn(300, 64).bfloat16()
    results = []
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        results.append(gradients(block, grad_y, 0.1))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_the_number_of_threads_may_change_before_the_backward(set_threads):
    leaves = present(make_block(200, 64, 264, dtype=torch.float64).requires_grad_())
    set_threads(1)
    y = run(*leaves).y
    set_threads(3)
    ours = torch.autograd.grad(y.sum(), leaves)
    exact = torch.autograd.grad(run(*leaves, path="dense").y.sum(), leaves)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_only_some_operands_need_gradients():
    block = make_block(9, 64, 136, dtype=torch.float64)
    for leaf in block.operands:
        leaf.requires_grad_()
        run(*block.operands).y.sum().backward()
        leaf.requires_grad_(False)
        grads = [t.grad for t in block.operands]
        assert leaf.grad is not None and sum(g is not None for g in grads) == 1
        leaf.grad = None


def test_nothing_is_saved_without_a_gradient(monkeypatch):
    block = make_block(9, 64, 136)
    saves = []
    forward = torch.ops.twell.ffn_forward
    monkeypatch.setattr(
        torch.ops.twell, "ffn_forward", lambda *a: saves.append(a[-1]) or forward(*a)
    )
    run(*block.operands)
    block.requires_grad_()
    run(*block.operands)
    with torch.no_grad():
        run(*block.operands)
    assert saves == [False, True, False]


def test_no_second_derivative():
    leaves = present(make_block(3, 16, 24, dtype=torch.float64).requires_grad_())
    (grad,) = torch.autograd.grad(run(*leaves).y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("l1", [False, True])
def test_opcheck(kind, l1):
    torch.use_deterministic_algorithms(True)  # fills what `saved` leaves unused
    try:
        block = make_block(21, 32, 72, kind=kind, density=0.3, dtype=torch.float64)
        *_, saved = torch.ops.twell.ffn_forward(*block.operands, True)
        grad_l1 = torch.tensor(0.5, dtype=torch.float64) if l1 else None
        backward_args = (torch.randn_like(block.x), grad_l1, *block.operands, saved)
        torch.library.opcheck(torch.ops.twell.ffn_backward, backward_args)
        block.requires_grad_()
        torch.library.opcheck(torch.ops.twell.ffn_forward, (*block.operands, True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("module", "path", "dynamic", "backend"),
    [
        (module, path, dynamic, "aot_eager")
        for module in (twell.GatedFFN, twell.FFN)
        for path in ("auto", "dense", "twell")
        for dynamic in (False, True)
    ]
    + [(twell.GatedFFN, "twell", dynamic, "inductor") for dynamic in (False, True)],
)
def test_compile_fullgraph(module, path, dynamic, backend):
    torch._dynamo.reset()
    ffn = module(64, 136, path=path, dtype=torch.float64)

    def loss(x):
        y = ffn(x)
        return y.square().sum() + 0.1 * ffn.l1

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (40, 56, 40):
        x = torch.randn(tokens, 64, dtype=torch.float64, requires_grad=True)
        expected = torch.autograd.grad(loss(x), [x, *ffn.parameters()])
        activity = ffn.activity
        actual = torch.autograd.grad(compiled(x), [x, *ffn.parameters()])
        assert torch.equal(ffn.activity, activity)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_modules_observe_and_replan():
    torch._dynamo.reset()
    ffn = twell.GatedFFN(64, 136)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(40, 64))
        assert 0 < ffn.mean_active < 136 and ffn._expected == (136, 136)
        ffn.replan()
        assert 0 < ffn._expected[0] < 136 and ffn._expected[1] is None
        torch.testing.assert_close(compiled(x := torch.randn(40, 64)), ffn(x))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("path", ["auto", "twell"])
def test_checkpointing_modules(path, compiled):
    ffn = twell.GatedFFN(64, 136, path=path, dtype=torch.float64)
    x = torch.randn(40, 64, dtype=torch.float64, requires_grad=True)

    def loss(run):
        y = run(x)
        return y.square().sum() + 0.1 * ffn.l1

    def checkpointed(x):
        return checkpoint(ffn, x, use_reentrant=False)

    inputs = [x, *ffn.parameters()]
    expected = torch.autograd.grad(loss(ffn), inputs)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        if compiled:
            checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(loss(checkpointed), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_functions(kind, compiled):
    leaves = present(make_block(40, 64, 136, kind=kind, dtype=torch.float64).requires_grad_())

    def block(*operands):
        out = run(*operands)
        return out.y, out.l1

    def checkpointed(*operands):
        return checkpoint(block, *operands, use_reentrant=False)

    def gradients_through(call):
        y, l1 = call(*leaves)
        return torch.autograd.grad(y.square().sum() + 0.1 * l1, leaves)

    torch._dynamo.reset()
    expected = gradients_through(block)
    if compiled:
        checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients_through(checkpointed), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_lowers_the_loss():
    ffn = twell.GatedFFN(64, 136)
    optimizer = torch.optim.SGD(ffn.parameters(), lr=0.05)
    x, target = torch.randn(50, 64), torch.randn(50, 64)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(ffn(x), target) + 1e-4 * ffn.l1 / len(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_gradients_of_nan_are_nan():
    block = make_block(6, 64, 136, dtype=torch.float32)
    block.x[2, 5] = float("nan")
    grads = gradients(block, torch.ones(6, 64), 0.0)
    dense = gradients(block, torch.ones(6, 64), 0.0, path="dense")
    for ours, theirs in zip(grads, dense, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_reference_and_dense_path_share_nothing_with_the_operator():
    """The oracle of this file is PyTorch's autograd on float64; it agrees with plain formulas."""
    block = make_block(9, 16, 24, dtype=torch.float64)
    y, h, _ = reference(block)
    out = run(*block.operands, path="dense")
    torch.testing.assert_close(out.y, y)
    torch.testing.assert_close(out.l1, h.abs().sum())
