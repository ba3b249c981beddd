"""ffn_backward_accumulate: the gradients of weights, added to given tensors."""

import pytest
import torch
from ffn_cases import make_block, relative_error

from twell import functional

KINDS = ["gated", "plain"]
L1_WEIGHT = 0.25


def accumulate(block, grad_y, gradients, parts=1):
    """Adds to ``gradients`` those of each part of the tokens, one after the other; grad_x."""
    weights = block.operands[1:]
    l1_dtype = torch.promote_types(block.x.dtype, torch.float32)
    grad_l1 = torch.tensor(L1_WEIGHT, dtype=l1_dtype, device=block.x.device)
    grad_x = []
    for x, dy in zip(block.x.chunk(parts), grad_y.chunk(parts), strict=True):
        saved = torch.ops.twell.ffn_forward(x, *weights, True)[4]
        call = torch.ops.twell.ffn_backward_accumulate
        grad_x.append(call(dy, grad_l1, x, *weights, saved, *gradients))
    return torch.cat(grad_x)


def old_gradients(block):
    """What the gradients hold beforehand."""
    return [None if t is None else torch.randn_like(t) for t in block.operands[1:]]


def by_autograd(block, grad_y, old, parts=1):
    """The same with PyTorch's dense products and .grad; then grad_x."""
    weights = [t.detach().requires_grad_() for t in block.operands[1:] if t is not None]
    for weight, gradient in zip(weights, [t for t in old if t is not None], strict=True):
        weight.grad = gradient.clone()
    grad_x = []
    for rows, dy in zip(block.x.chunk(parts), grad_y.chunk(parts), strict=True):
        x = rows.detach().requires_grad_()
        call = functional.gated_ffn if len(weights) == 3 else functional.ffn
        out = call(x, *weights, path="dense")
        ((out.y * dy).sum(dtype=torch.float64) + L1_WEIGHT * out.l1).backward()
        grad_x.append(x.grad)
    return [*(t.grad for t in weights), torch.cat(grad_x)]


def check_parts(block, parts):
    """Against float64 on all tokens at once: no worse than PyTorch on the same parts."""
    grad_y = torch.randn_like(block.x)
    old = old_gradients(block)
    wide = [None if t is None else t.double() for t in old]
    exact = by_autograd(block.to(torch.float64), grad_y.double(), wide)
    dense = by_autograd(block, grad_y, old, parts)
    gradients = [None if t is None else t.clone() for t in old]
    grad_x = accumulate(block, grad_y, gradients, parts)
    ours = [*(t for t in gradients if t is not None), grad_x]
    floor = 64 * torch.finfo(torch.promote_types(block.x.dtype, torch.float32)).eps
    for a, b, expected in zip(ours, dense, exact, strict=True):
        assert relative_error(a, expected) <= 1.1 * relative_error(b, expected) + floor


@pytest.mark.parametrize("tokens", [20, 5000])  # of several chunks
def test_the_gradient_of_y_may_be_x(tokens):
    block = make_block(tokens, 16, 40, dtype=torch.float32)
    old = old_gradients(block)
    apart, shared = [[t.clone() for t in old] for _ in range(2)]
    accumulate(block, block.x.clone(), apart)
    accumulate(block, block.x, shared)
    for a, b in zip(apart, shared, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole(kind, density, dtype):
    check_parts(make_block(300, 64, 264, kind=kind, density=density, dtype=dtype), parts=3)


@pytest.mark.parametrize("tokens", [0, 20])
def test_what_gets_nothing_stays_as_it_is(tokens):
    block = make_block(tokens, 64, 136, density=0)
    old = old_gradients(block)
    gradients = [t.clone() for t in old]
    assert not accumulate(block, torch.randn_like(block.x), gradients).any()
    assert all(torch.equal(a, b) for a, b in zip(gradients, old, strict=True))


def test_each_gradient_is_optional():
    block = make_block(20, 64, 136, dtype=torch.float64)
    grad_y = torch.randn_like(block.x)
    old = old_gradients(block)
    want = [t.clone() for t in old]
    accumulate(block, grad_y, want)
    for left_out in range(3):
        gradients = [None if i == left_out else t.clone() for i, t in enumerate(old)]
        accumulate(block, grad_y, gradients)
        for a, b in zip(gradients, want, strict=True):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    torch.use_deterministic_algorithms(True)  # fills what `saved` leaves unused
    try:
        block = make_block(21, 32, 72, kind=kind, density=0.3, dtype=torch.float64)
        saved = torch.ops.twell.ffn_forward(*block.operands, True)[4]
        arguments = (torch.randn_like(block.x), None, *block.operands, saved)
        for gradients in (old_gradients(block), [None, *old_gradients(block)[1:2], None]):
            torch.library.opcheck(torch.ops.twell.ffn_backward_accumulate, (*arguments, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    block = make_block(40, 64, 136, dtype=torch.float64)
    grad_y = torch.randn_like(block.x)
    old = old_gradients(block)
    eager, compiled = ([t.clone() for t in old] for _ in range(2))
    want = accumulate(block, grad_y, eager, 2)
    run = torch.compile(accumulate, fullgraph=True, backend=backend)
    assert torch.equal(run(block, grad_y, compiled, 2), want)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
