"""Each bad argument of the FFN operators has its line: name, value, what is permitted."""

import pytest
import torch

import twell
from twell import functional

BF16 = torch.bfloat16


def operands(**change):
    block = {
        "x": torch.zeros(4, 64, dtype=BF16),
        "gate": torch.zeros(128, 64, dtype=BF16),
        "up": torch.zeros(128, 64, dtype=BF16),
        "down": torch.zeros(128, 64, dtype=BF16),
    }
    return block | change


BAD_OPERANDS = {
    "x of float16": (
        operands(x=torch.zeros(4, 64, dtype=torch.float16)),
        "x has dtype Half; it must be BFloat16, Float or Double",
    ),
    "x of one dimension": (
        operands(x=torch.zeros(64, dtype=BF16)),
        r"x has shape \[64\]; it must have 2 dimensions",
    ),
    "x of three dimensions": (
        operands(x=torch.zeros(2, 2, 64, dtype=BF16)),
        r"x has shape \[2, 2, 64\]; it must have 2 dimensions",
    ),
    "x with strides": (
        operands(x=torch.zeros(64, 4, dtype=BF16).t()),
        r"x has shape \[4, 64\] with strides \[1, 4\]; it must be contiguous",
    ),
    "x of another width": (
        operands(x=torch.zeros(4, 72, dtype=BF16)),
        r"up has shape \[128, 64\]; it must be \[neurons, hidden\] = \[128, 72\]",
    ),
    "up of one dimension": (
        operands(up=torch.zeros(64, dtype=BF16)),
        r"up has shape \[64\]; it must have 2 dimensions",
    ),
    "up of another dtype": (
        operands(up=torch.zeros(128, 64)),
        "up has dtype Float; it must be BFloat16",
    ),
    "gate of another shape": (
        operands(gate=torch.zeros(120, 64, dtype=BF16)),
        r"gate has shape \[120, 64\]; it must be \[neurons, hidden\] = \[128, 64\]",
    ),
    "gate of another dtype": (
        operands(gate=torch.zeros(128, 64, dtype=torch.float64)),
        "gate has dtype Double; it must be BFloat16",
    ),
    "down not transposed": (
        operands(down=torch.zeros(64, 128, dtype=BF16)),
        r"down has shape \[64, 128\]; it must be \[neurons, hidden\] = \[128, 64\]",
    ),
    "down with strides": (
        operands(down=torch.zeros(64, 128, dtype=BF16).t()),
        r"down has shape \[128, 64\] with strides \[1, 128\]; it must be contiguous",
    ),
    "hidden not a multiple of 8": (
        {n: torch.zeros(t.shape[0], 60, dtype=BF16) for n, t in operands().items()},
        "hidden is 60; permitted: a positive multiple of 8",
    ),
    "no hidden": (
        {n: torch.zeros(t.shape[0], 0, dtype=BF16) for n, t in operands().items()},
        "hidden is 0; permitted: a positive multiple of 8",
    ),
    "neurons not a multiple of 8": (
        operands(**{n: torch.zeros(100, 64, dtype=BF16) for n in ("gate", "up", "down")}),
        "neurons is 100; permitted: a positive multiple of 8",
    ),
    "too many neurons": (
        operands(**{n: torch.zeros(65_544, 64, dtype=BF16) for n in ("gate", "up", "down")}),
        "neurons is 65544; permitted: .* at most 65536",
    ),
}


def refused(call, complaint):
    with pytest.raises(RuntimeError, match=complaint) as raised:
        call()
    message = str(raised.value)
    assert message.startswith("twell: ") and "\n" not in message


@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_forward_refuses(case):
    bad, complaint = BAD_OPERANDS[case]
    refused(lambda: torch.ops.twell.ffn_forward(*bad.values(), False), complaint)


@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_backward_refuses(case):
    bad, complaint = BAD_OPERANDS[case]
    saved = torch.zeros(0, dtype=torch.uint8)
    grad_y = torch.zeros(4, 64, dtype=BF16)
    call = torch.ops.twell.ffn_backward
    refused(lambda: call(grad_y, None, *bad.values(), saved), complaint)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"grad_y": torch.zeros(4, 64)}, "grad_y has dtype Float; it must be BFloat16"),
        ({"grad_y": torch.zeros(3, 64, dtype=BF16)}, r"grad_y has shape \[3, 64\]; .* \[4, 64\]"),
        ({"grad_y": torch.zeros(64, 4, dtype=BF16).t()}, "grad_y .* must be contiguous"),
        ({"grad_l1": torch.zeros((), dtype=BF16)}, "grad_l1 has dtype BFloat16; it must be Float"),
        ({"grad_l1": torch.zeros(1)}, r"grad_l1 has shape \[1\]; it must have 0 dimensions"),
        ({"saved": torch.zeros(0, dtype=torch.uint8)}, "saved has shape .* save=True"),
        ({"saved": torch.zeros(8)}, "saved has dtype Float; it must be Byte"),
    ],
    ids=str,
)
def test_backward_refuses_what_is_its_own(change, complaint):
    block = operands()
    *_, saved = torch.ops.twell.ffn_forward(*block.values(), True)
    arguments = {"grad_y": torch.zeros(4, 64, dtype=BF16), "grad_l1": None} | block
    arguments = arguments | {"saved": saved} | change
    refused(lambda: torch.ops.twell.ffn_backward(*arguments.values()), complaint)


@pytest.mark.parametrize(
    ("gradients", "complaint"),
    [
        ((torch.zeros(128, 64), None, None), "grad_gate has dtype Float; it must be BFloat16"),
        (
            (None, torch.zeros(64, 128, dtype=BF16), None),
            r"grad_up has .* it must be .* \[128, 64\]",
        ),
        ((None, None, torch.zeros(64, 128, dtype=BF16).t()), "grad_down .* must be contiguous"),
    ],
    ids=str,
)
def test_accumulating_refuses(gradients, complaint):
    block = operands()
    *_, saved = torch.ops.twell.ffn_forward(*block.values(), True)
    arguments = (torch.zeros(4, 64, dtype=BF16), None, *block.values(), saved, *gradients)
    refused(lambda: torch.ops.twell.ffn_backward_accumulate(*arguments), complaint)


def test_functional_refuses_an_unknown_path():
    with pytest.raises(ValueError, match="path is 'fast'; it must be 'dense' or 'twell'"):
        functional.gated_ffn(*operands().values(), path="fast")


def test_no_gradient_without_saving():
    block = operands(x=torch.ones(4, 64, dtype=BF16, requires_grad=True))
    y = torch.ops.twell.ffn_forward(*block.values(), False)[0]
    with pytest.raises(RuntimeError, match="ran with save=False"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"hidden": 60}, RuntimeError, "hidden is 60"),
        ({"neurons": 65_544}, RuntimeError, "neurons is 65544"),
        ({"dtype": torch.float16}, RuntimeError, "dtype Half"),
        ({"path": "fast"}, ValueError, "path is 'fast'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [twell.GatedFFN, twell.FFN])
def test_modules_refuse_when_they_are_made(module, change, error, complaint):
    with pytest.raises(error, match=complaint):
        module(**({"hidden": 64, "neurons": 128} | change))


def test_a_device_without_kernels():
    """PyTorch itself names the operator and the device."""
    block = {name: t.to_sparse() for name, t in operands().items()}
    with pytest.raises(NotImplementedError, match=r"twell::ffn_forward.*Sparse"):
        torch.ops.twell.ffn_forward(*block.values(), False)
