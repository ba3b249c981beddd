"""The operators on the TwELL format and the planner's operator."""

import pytest
import torch
from ffn_cases import make_block

import twell


def values_of(rows, columns, density):
    values = torch.rand(rows, columns).clamp(min=1e-3)
    return (values * (torch.rand(rows, columns) < density)).to(torch.bfloat16)


@pytest.mark.parametrize("slots", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 256), (5, 257), (9, 1000)], ids=str)
def test_encode_decode(shape, slots):
    values = values_of(*shape, density=0.01)
    words, overflow = torch.ops.twell.twell_encode(values, slots)
    assert words.shape == (shape[0], -(-shape[1] // 256), slots) and overflow == 0
    assert torch.equal(torch.ops.twell.twell_decode(words, shape[1]), values)


def test_layout_is_the_published_one():
    values = torch.zeros(1, 512, dtype=torch.bfloat16)
    values[0, 3], values[0, 300], values[0, 301] = 1.0, 2.0, 0.5
    words, _ = torch.ops.twell.twell_encode(values, 8)
    assert words[0, :, 0].tolist() == [1, 2]
    assert words[0, 0, 1] == 0x3F80 << 16 | 3
    assert words[0, 1, 1:3].tolist() == [0x4000 << 16 | 300, 0x3F00 << 16 | 301]


def test_overflow_is_counted_and_not_decoded():
    values = torch.ones(2, 512, dtype=torch.bfloat16)
    values[0, :250] = 0
    words, overflow = torch.ops.twell.twell_encode(values, 8)
    assert overflow == 3 and words[:, :, 0].tolist() == [[6, 256], [256, 256]]
    with pytest.raises(RuntimeError, match="row 0"):
        torch.ops.twell.twell_decode(words, 512)


def test_opcheck():
    values = values_of(5, 300, 0.02)
    torch.library.opcheck(torch.ops.twell.twell_encode, (values, 16))
    words, _ = torch.ops.twell.twell_encode(values, 16)
    torch.library.opcheck(torch.ops.twell.twell_decode, (words, 300))


@pytest.mark.parametrize("slots", [8, 32, 128])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(0, 64, 264), (1, 64, 1000), (130, 72, 520)], ids=str)
def test_gate_pack_is_the_encoded_gate(shape, density, slots):
    block = make_block(*shape, density=density)
    words, overflow = torch.ops.twell.gate_pack(block.x, block.gate, slots)
    pre = block.x.double() @ block.gate.double().T
    counts = torch.nn.functional.pad(pre > 0, (0, -shape[2] % 256)).unflatten(1, (-1, 256)).sum(2)
    assert torch.equal(words[:, :, 0], counts.int())
    assert overflow == (counts > slots - 1).sum()
    if overflow == 0:
        values = torch.ops.twell.twell_decode(words, shape[2])
        torch.testing.assert_close(values.double(), pre.relu(), rtol=2**-8, atol=1e-6)


def test_gate_pack_opcheck():
    block = make_block(5, 64, 264, density=0.02)
    torch.library.opcheck(torch.ops.twell.gate_pack, (block.x, block.gate, 16))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(4, 64)}, "x has dtype Float; it must be BFloat16"),
        ({"gate": torch.zeros(4, 64)}, "gate has dtype Float; it must be BFloat16"),
        ({"gate": torch.zeros(8, 72).bfloat16()}, r"gate has shape \[8, 72\]; .* = \[8, 64\]"),
        ({"gate": torch.zeros(65_544, 64).bfloat16()}, "columns is 65544"),
        ({"slots": 12}, "slots is 12"),
    ],
    ids=str,
)
def test_gate_pack_refuses(change, complaint):
    arguments = {"x": torch.zeros(4, 64).bfloat16(), "gate": torch.zeros(8, 64).bfloat16()}
    arguments = arguments | {"slots": 32} | change
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.twell.gate_pack(*arguments.values())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((torch.zeros(2, 8), 8), "values has dtype Float; it must be BFloat16"),
        ((torch.zeros(8, dtype=torch.bfloat16), 8), r"values has shape \[8\]; .* 2 dimensions"),
        ((torch.zeros(8, 2, dtype=torch.bfloat16).t(), 8), "values .* must be contiguous"),
        ((torch.zeros(2, 8, dtype=torch.bfloat16), 9), "slots is 9"),
        ((torch.zeros(2, 8, dtype=torch.bfloat16), 2**40), f"slots is {2**40}"),
        ((torch.zeros(2, 65_537, dtype=torch.bfloat16), 8), "columns is 65537"),
    ],
    ids=["dtype", "dim", "strides", "slots", "huge slots", "columns"],
)
def test_encode_refuses(arguments, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.twell.twell_encode(*arguments)


def test_decode_refuses():
    words, _ = torch.ops.twell.twell_encode(values_of(2, 300, 0.02), 8)
    with pytest.raises(
        RuntimeError, match=r"words has shape \[2, 2, 8\]; it must be .* \[2, 3, 8\]"
    ):
        torch.ops.twell.twell_decode(words, 600)
    with pytest.raises(RuntimeError, match="words has dtype Long; it must be Int"):
        torch.ops.twell.twell_decode(words.long(), 300)
    words[1, 0, 0] = 300
    with pytest.raises(RuntimeError, match="row 1"):
        torch.ops.twell.twell_decode(words, 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 512])
def test_plan_takes_the_path_that_it_predicts_to_be_faster(tokens, dtype):
    plans = [
        twell.plan(2048, 5632, tokens, dtype=dtype, expected_active=active)
        for active in (0, 28, 280, 2800, 5632)
    ]
    sparse_ms = [plan["predicted_sparse_ms"] for plan in plans]
    assert sparse_ms == sorted(sparse_ms) and sparse_ms[0] < sparse_ms[-1]
    for plan in plans:
        dense_is_faster = plan["predicted_dense_ms"] < plan["predicted_sparse_ms"]
        assert plan["path"] == ("dense" if dense_is_faster else "twell")
    assert plans[0]["path"] == "twell"


@pytest.mark.parametrize("path", ["dense", "twell"])
def test_plan_keeps_a_given_path(path):
    assert twell.plan(64, 128, 10, path=path, expected_active=64)["path"] == path


def test_plan_of_training_saves():
    assert twell.plan(64, 128, 10, path="twell")["saved_bytes"] == 0
    assert twell.plan(64, 128, 10, path="twell", training=True)["saved_bytes"] > 0


def test_plan_knows_the_number_of_threads(set_threads):
    set_threads(3)
    assert "3 threads" in twell.plan(64, 128, 10)["device"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden": 60}, "hidden is 60"),
        ({"hidden": 0}, "hidden is 0"),
        ({"neurons": 12}, "neurons is 12"),
        ({"neurons": 65_544}, "neurons is 65544"),
        ({"tokens": -1}, "tokens is -1"),
        ({"kind": "glu"}, "kind is 'glu'; it must be gated or plain"),
        ({"path": "fast"}, "path is 'fast'; it must be auto, dense or twell"),
        ({"dtype": torch.float16}, "dtype Half; it must be BFloat16, Float or Double"),
        ({"device": "xla:0"}, "device is 'xla:0'; it must be cpu, cuda, cuda:N or like sm_90x132"),
    ],
    ids=str,
)
def test_plan_refuses(change, complaint):
    arguments = {"hidden": 64, "neurons": 128, "tokens": 10} | change
    with pytest.raises(RuntimeError, match=complaint):
        twell.plan(**arguments)
