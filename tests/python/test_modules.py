"""twell.GatedFFN and twell.FFN as modules: checkpoints, paths, the running mean."""

import copy
import io

import pytest
import torch

import twell
from twell import modules

MODULES = {"gated": twell.GatedFFN, "plain": twell.FFN}


@pytest.fixture(params=MODULES)
def kind(request):
    return request.param


def expected_output(ffn, x):
    selector = ffn.gate if ffn.kind == "gated" else ffn.up
    h = torch.relu(x @ selector.T)
    if ffn.kind == "gated":
        h = h * (x @ ffn.up.T)
    return h @ ffn.down


def reported(h_active, ffn, tokens):
    assert ffn.l0 == h_active.sum() and torch.equal(ffn.activity, h_active.sum(0).int())
    assert ffn.l0 <= tokens * ffn.neurons


@pytest.mark.parametrize("path", ["auto", "dense", "twell"])
def test_output_and_counts(kind, path):
    ffn = MODULES[kind](64, 136, path=path, dtype=torch.float64)
    assert ffn.l0 is None and ffn.l1 is None and ffn.activity is None
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    torch.testing.assert_close(ffn(x), expected_output(ffn, x))
    selector = ffn.gate if kind == "gated" else ffn.up
    reported((x @ selector.T > 0).reshape(10, 136), ffn, 10)
    assert ffn.l1.dtype == torch.float64 and ffn.l1 > 0


def test_parameters_are_neuron_major(kind):
    ffn = MODULES[kind](64, 136)
    names = ["gate", "up", "down"] if kind == "gated" else ["up", "down"]
    assert [n for n, _ in ffn.named_parameters()] == [f"{n}_proj.weight" for n in names]
    for name in names:
        weight = getattr(ffn, name)
        assert weight.shape == (136, 64) and weight.requires_grad and weight.std() > 0.01
    assert not hasattr(ffn, "gate") or kind == "gated"


def test_checkpoints_have_the_layout_of_linear_layers(kind):
    ffn = MODULES[kind](64, 136)
    state = ffn.state_dict()
    assert state["up_proj.weight"].shape == (136, 64)
    assert state["down_proj.weight"].shape == (64, 136)
    assert "mean_active" not in state
    linear = torch.nn.Linear(136, 64, bias=False)
    linear.load_state_dict({"weight": state["down_proj.weight"]})
    assert torch.equal(linear.weight, ffn.down.T)

    loaded = MODULES[kind](64, 136)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    x = torch.randn(3, 64)
    assert loaded.down.is_contiguous()
    assert torch.equal(loaded(x), ffn(x))


def test_writing_through_the_state_dict_reaches_the_weights(kind):
    ffn = MODULES[kind](64, 136)
    ffn.state_dict()["down_proj.weight"].fill_(2)
    assert (ffn.down == 2).all()


def test_a_checkpoint_that_is_not_transposed_is_refused(kind):
    ffn = MODULES[kind](64, 136)
    state = ffn.state_dict() | {"down_proj.weight": ffn.down.detach()}
    with pytest.raises(RuntimeError, match=r"size mismatch for down_proj\.weight"):
        ffn.load_state_dict(state)


def test_materialising_from_the_meta_device(kind):
    ffn = MODULES[kind](64, 136, device="meta")
    ffn.to_empty(device="cpu")
    ffn.reset_parameters()
    assert ffn.mean_active == -1
    assert ffn(torch.randn(3, 64)).isfinite().all()


def test_copies_leave_the_last_call_behind(kind):
    ffn = MODULES[kind](64, 136)
    x = torch.randn(3, 64)
    y = ffn(x.requires_grad_())
    clone = copy.deepcopy(ffn)
    assert clone.l1 is None and ffn.l1 is not None
    assert torch.equal(clone(x), y)


class Planner:
    """Stands in for the planner; counts the questions."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(modules, "faster_path", self)

    def __call__(self, kind, hidden, neurons, tokens, dtype, training, expected_active, device):
        self.asked.append((tokens, training, expected_active))
        return "dense" if expected_active > 40 else "twell"


def test_auto_follows_the_running_mean(kind, monkeypatch):
    planner = Planner(monkeypatch)
    ffn = MODULES[kind](64, 136, path="auto")
    selector = ffn.gate_proj if kind == "gated" else ffn.up_proj
    paths = []
    run = type(ffn)._run
    monkeypatch.setattr(type(ffn), "_run", lambda s, x, p: paths.append(p) or run(s, x, p))
    x = torch.ones(20, 64)
    with torch.no_grad():
        selector.weight.abs_()  # every neuron active
        for _ in range(3):
            ffn(x)
        assert ffn.mean_active == 136
        selector.weight.neg_()  # none
        for _ in range(61):
            ffn(x)
    assert paths[0] == "twell" and paths[1] == "dense" and paths[-1] == "twell"
    assert ffn.mean_active < 1
    assert planner.asked[0] == (8, False, -1)


def test_the_running_mean_is_read_seldom(kind, monkeypatch):
    Planner(monkeypatch)
    ffn = MODULES[kind](8, 8, path="auto")
    reads = []
    monkeypatch.setattr(ffn, "replan", lambda: reads.append(ffn._calls))
    for _ in range(3000):
        ffn._observe(torch.tensor(3))
    assert reads == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


@pytest.mark.parametrize("path", ["dense", "twell"])
def test_a_given_path_observes_nothing(kind, path):
    ffn = MODULES[kind](64, 136, path=path)
    ffn(torch.randn(3, 64))
    assert ffn.mean_active == -1


def test_no_tokens(kind):
    ffn = MODULES[kind](64, 136)
    assert ffn(torch.randn(2, 0, 64)).shape == (2, 0, 64)
    assert ffn.mean_active == -1 and ffn.l0 == 0


def test_a_path_may_change(kind):
    ffn = MODULES[kind](64, 136, path="dense", dtype=torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    y = ffn(x)
    ffn.path = "twell"
    torch.testing.assert_close(ffn(x), y)


def test_autocast(kind):
    ffn = MODULES[kind](64, 136, path="twell")
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x)
    assert y.dtype == torch.bfloat16 and ffn.l1.dtype == torch.float32
    ffn.path = "dense"
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ffn(x), y, rtol=0.05, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        double = MODULES[kind](64, 136, path="twell", dtype=torch.float64)
        assert double(x.double()).dtype == torch.float64  # as Linear: float64 is left alone
    ffn.path = "twell"
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(RuntimeError, match="x has dtype Half"),
    ):
        ffn(x)
