"""twell.GatedFFN and twell.FFN as modules: checkpoints, paths, the running mean."""

import copy
import io

import pytest
import torch

import twell
from twell import modules, planning

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
    """Stands in for the planner: dense above 40 active neurons. Notes what it is told."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(modules, "path_ranges", self)

    def __call__(self, kind, hidden, neurons, dtype, training, active, union, device):
        self.asked.append((training, active, union))
        return ((0, "dense" if active > 40 else "twell"),)


@pytest.fixture
def ran(kind, monkeypatch):
    """The paths that ran, in order."""
    paths = []
    run = MODULES[kind]._run
    monkeypatch.setattr(MODULES[kind], "_run", lambda s, x, p: paths.append(p) or run(s, x, p))
    return paths


def test_auto_follows_the_density(kind, monkeypatch, ran):
    planner = Planner(monkeypatch)
    ffn = MODULES[kind](64, 136, path="auto")
    selector = ffn.gate_proj if kind == "gated" else ffn.up_proj
    x = torch.ones(128, 64)
    with torch.no_grad():
        selector.weight.abs_().neg_()  # no neuron active
        for _ in range(40):
            ffn(x)
        assert planner.asked[:2] == [(False, 136, 136), (False, 0, 0)]  # at first the densest
        assert ran == ["dense"] + ["twell"] * 39
        assert ffn.mean_active == 0 and ffn.mean_union == 0
        selector.weight.neg_()  # all
        for _ in range(24):
            ffn(x)
        assert ran[40:] == ["twell"] * 16 + ["dense"] * 8  # measured after call 48, counts after 56
        selector.weight.neg_()
        for _ in range(100):
            ffn(x)
    assert ran[-1] == "twell"
    assert ffn.mean_active < 4


def test_a_tile_has_the_neurons_that_are_active_now_and_then(monkeypatch):
    Planner(monkeypatch)
    ffn = twell.FFN(64, 136)
    with torch.no_grad():
        ffn.up.fill_(-1)[:40, 0] = 100  # 40 neurons, for every tenth token
        x = torch.ones(1000, 64)
        x[torch.arange(1000) % 10 > 0, 0] = 0
        ffn(x)
        assert ffn.mean_active == pytest.approx(4)
        assert ffn.mean_union == pytest.approx(40 * (1 - 0.9**128))
        ffn(x[:127])  # too few to tell
        assert ffn.mean_union == pytest.approx(40 * (1 - 0.9**128))


def test_density_is_planned_with_in_steps_that_are_no_smaller():
    ffn = twell.FFN(64, 136)
    for mean in (0.0, 0.3, 1.0, 17.0, 100.0, 135.0, 136.0):
        ffn._expect(mean, -1.0)
        active, union = ffn._expected
        assert union is None and mean <= active <= min(136, 1.2 * (mean + 1)), mean


def test_measurements_are_seldom_and_count_half_an_interval_later(kind, monkeypatch):
    Planner(monkeypatch)
    ffn = MODULES[kind](8, 8, path="auto")
    measured, counted = [], []
    monkeypatch.setattr(ffn, "_measure", lambda *_: measured.append(ffn._calls))
    monkeypatch.setattr(ffn, "_expect", lambda *_: counted.append(ffn._calls))
    for _ in range(70):
        ffn(torch.randn(3, 8))
    assert measured == [1, 2, 4, 8, 16, 32, 48, 64]
    assert counted == [1, 3, 6, 12, 24, 40, 56]


def test_a_checkpoint_recomputes_on_the_path_of_its_forward(kind, monkeypatch, ran):
    Planner(monkeypatch)
    ffn = MODULES[kind](64, 136, dtype=torch.float64)
    selector = ffn.gate_proj if kind == "gated" else ffn.up_proj
    with torch.no_grad():
        selector.weight.abs_().neg_()
    x = torch.ones(20, 64, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        torch.utils.checkpoint.checkpoint(ffn, x, use_reentrant=False).sum().backward()
    assert ran == ["dense"] * 2 + ["twell"] * 4
    assert ffn._calls == 3


H200 = "sm_90x132"


@pytest.fixture
def on_an_h200(monkeypatch):
    """The planner is asked for an H200, wherever the block runs."""
    ranges = planning.path_ranges
    monkeypatch.setattr(modules, "path_ranges", lambda *a: ranges(*a[:-1], H200))


@pytest.mark.parametrize(("tokens", "path"), [(1, "twell"), (128, "dense"), (1024, "twell")])
def test_the_density_of_a_trace_on_an_h200(tokens, path, on_an_h200, monkeypatch):
    ffn = twell.GatedFFN(2048, 5632, dtype=torch.bfloat16)
    ffn._expect(47.6, 1134.9)  # 0.8%
    ran = []
    monkeypatch.setattr(ffn, "_run", lambda x, path: ran.append(path) or functional_zeros(x))
    with torch.no_grad():
        ffn(torch.zeros(tokens, 2048, dtype=torch.bfloat16))
    assert ran == [path]


def functional_zeros(x):
    zero = torch.zeros((), dtype=torch.int64)
    return twell.functional.FfnOutput(x, zero, zero.float(), zero.expand(5632))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("active", "union"), [(0, 0), (10, 300), (48, 1135), (111, None), (282, None), (2816, 5632)]
)
def test_ranges_agree_with_the_planner_at_their_ends(training, active, union):
    ranges = planning.path_ranges(
        "gated", 2048, 5632, torch.bfloat16, training, active, union, H200
    )
    assert ranges[-1][0] == 0 and [r[0] for r in ranges] == sorted(r[0] for r in ranges)[::-1]
    known = {"expected_active": active, "expected_union": union, "training": training}
    for tokens in (1, 2, 4, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128, 512, 1024, 2048, 4096, 10**5):
        taken = next(path for first, path in ranges if tokens >= first)
        p = twell.plan(2048, 5632, tokens, device=H200, **known)
        if taken == "twell":
            assert p["path"] == "twell", tokens
        else:  # at worst the planner's gain is missed where a range's other end has none
            assert p["path"] == "dense" or p["predicted_dense_ms"] < 1.25 * p["predicted_sparse_ms"]


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
