"""The forward operator: exact at every density and shape, reproducible, NaN-preserving."""

import pytest
import torch
from ffn_cases import dense, make_block, reference, relative_error

from twell import functional

SHAPES = [  # tokens, hidden, neurons
    (1, 8, 8),
    (1, 256, 1024),
    (7, 72, 264),
    (16, 64, 248),
    (127, 136, 520),
    (128, 256, 768),
    (129, 264, 1000),
    (700, 128, 512),
]
DENSITIES = [0.0, 0.005, 0.05, 0.5, 1.0]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
KINDS = ["gated", "plain"]


def forward(block, save=False):
    return torch.ops.twell.ffn_forward(*block.operands, save)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_in_bf16_is_that_of_the_dense_block(kind, shape, density):
    error = dense_error = 0.0
    for _ in range(1 + 500 // shape[0] // shape[1]):  # a few outputs alone say little
        block = make_block(*shape, kind=kind, density=density)
        expected, _, _ = reference(block)
        error += relative_error(forward(block)[0], expected) ** 2
        dense_error += relative_error(dense(block), expected) ** 2
    assert error <= 1.1**2 * dense_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_float64_are_not_rounded_to_bf16(kind, shape, density, dtype):
    block = make_block(*shape, kind=kind, density=density, dtype=dtype)
    expected, _, _ = reference(block)
    assert relative_error(forward(block)[0], expected) <= 256 * torch.finfo(dtype).eps


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_counting_is_optional(kind, save):
    block = make_block(130, 64, 520, kind=kind, density=0.05)
    y, l0, l1, activity, saved = torch.ops.twell.ffn_forward(*block.operands, save, count=False)
    want = forward(block, save)
    assert torch.equal(y, want[0]) and saved.shape == want[4].shape
    assert l0.shape == l1.shape == activity.shape == (0,)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_counts(kind, density, dtype, save):
    block = make_block(130, 64, 520, kind=kind, density=density, dtype=dtype)
    _, h, pre = reference(block)
    _, l0, l1, activity, saved = forward(block, save)
    unsure = pre.abs() < 1e-5  # their sign may depend on the order of the sum
    sure = (pre > 0) & ~unsure
    assert l0.dtype == torch.int64 and activity.dtype == torch.int32
    assert l1.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (activity >= sure.sum(0)).all() and (activity <= (sure | unsure).sum(0)).all()
    assert l0 == activity.sum()
    tolerance = 64 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 2**-7
    torch.testing.assert_close(l1.double(), h.abs().sum(), rtol=tolerance, atol=0)
    assert (saved.numel() > 0) == save


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [False, True])
def test_no_tokens(kind, save):
    y, l0, l1, activity, _ = forward(make_block(0, 64, 128, kind=kind), save)
    assert y.shape == (0, 64)
    assert l0 == 0 and l1 == 0 and activity.shape == (128,) and not activity.any()


@pytest.mark.parametrize("neurons", [8, 65_536])
def test_extreme_widths(neurons):
    block = make_block(3, 8, neurons, dtype=torch.float32, density=0.01)
    expected, _, _ = reference(block)
    assert relative_error(forward(block)[0], expected) <= 1e-5


def test_one_heavy_token_among_silent_ones():
    block = make_block(256, 64, 1024, density=0.0)
    block.x[77] = -block.x[77] * 100
    block.gate[:, 0] = -block.gate[:, 0].abs()
    expected, h, _ = reference(block)
    assert (h != 0).sum(1).nonzero().flatten().tolist() == [77]
    error = relative_error(forward(block)[0], expected)
    assert error <= 1.1 * relative_error(dense(block), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(kind, tokens, dtype, set_threads):
    block = make_block(tokens, 128, 776, kind=kind, density=0.05, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        results.append(forward(block)[:4])
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 6, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_spread_as_in_the_dense_block(kind, tokens, dtype, value):
    block = make_block(tokens, 64, 264, kind=kind, density=0.05, dtype=dtype)
    token = tokens // 2
    block.x[token, 3] = value
    y = forward(block)[0]
    # In float64: PyTorch's bf16 product on AMX lets a NaN reach the row before, as it reads beyond
    # a row's end where that is no multiple of 32.
    expected = dense(block.to(torch.float64)).to(dtype)
    assert not expected[token].isfinite().all()
    finite = expected.isfinite()
    assert torch.equal(y.isfinite(), finite)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~finite].nan_to_num(), expected[~finite].nan_to_num())
    torch.testing.assert_close(y[finite], expected[finite], rtol=0.05, atol=0.05)


def test_leading_dimensions_and_strided_activations():
    block = make_block(24, 64, 264, dtype=torch.float64)
    wide = torch.cat([block.x, block.x], 1).reshape(2, 3, 4, 128)
    out = functional.gated_ffn(wide[..., 64:], block.gate, block.up, block.down)
    assert out.y.shape == (2, 3, 4, 64)
    torch.testing.assert_close(out.y.reshape(24, 64), reference(block)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_path_agrees(kind, dtype):
    block = make_block(33, 64, 264, kind=kind, dtype=dtype)
    run = functional.ffn if block.gate is None else functional.gated_ffn
    operands = [t for t in block.operands if t is not None]
    sparse, plain = run(*operands), run(*operands, path="dense")
    eps = torch.finfo(dtype).eps
    assert relative_error(sparse.y, plain.y.double()) <= 4 * eps
    assert sparse.l0.dtype == plain.l0.dtype and sparse.l1.dtype == plain.l1.dtype
    assert torch.equal(sparse.activity, plain.activity) and sparse.l0 == plain.l0
    torch.testing.assert_close(sparse.l1, plain.l1, rtol=64 * eps, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_opcheck(kind, tokens, save):
    torch.use_deterministic_algorithms(True)  # fills what `saved` leaves unused
    try:
        block = make_block(tokens, 64, 136, kind=kind, dtype=torch.float32)
        torch.library.opcheck(torch.ops.twell.ffn_forward, (*block.operands, save))
        torch.library.opcheck(torch.ops.twell.ffn_forward, (*block.operands, save, False))
    finally:
        torch.use_deterministic_algorithms(False)
