"""twell.apply on small random transformers models."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file

import twell

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "relu",
}
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
TOKENS = torch.arange(2 * 9).reshape(2, 9) * 7 % 128


def make_model(family, dtype=torch.float32, **change):
    config_class, model_class = MODELS[family]
    model = model_class(config_class(**(SIZES | change)))
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@pytest.mark.parametrize("path", ["auto", "dense", "twell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_logits(family, dtype, path):
    model = make_model(family, dtype)
    expected = logits(model)
    summary = twell.apply(model, path)
    assert summary.modules == tuple(f"model.layers.{i}.mlp" for i in range(3))
    assert (summary.hidden, summary.neurons) == (64, (136, 136, 136))
    assert "replaced 3 feed-forward blocks (64 × 136)" in str(summary)
    assert all(isinstance(layer.mlp, twell.GatedFFN) for layer in model.model.layers)
    assert not any(m.training for m in model.modules())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


def test_weights_are_shared_not_doubled(family):
    model = make_model(family)
    before = {name: p for name, p in model.named_parameters()}
    twell.apply(model)
    after = {name: p for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        if "down_proj" in name:
            assert parameter.is_contiguous() and torch.equal(parameter.t(), before[name])
        else:
            assert parameter is before[name]


def test_save_pretrained_writes_what_it_wrote_before(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path / "before")
    twell.apply(model)
    model.save_pretrained(tmp_path / "after")
    before = load_file(tmp_path / "before" / "model.safetensors")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    loaded = MODELS[family][1].from_pretrained(tmp_path / "after")
    torch.testing.assert_close(logits(loaded.eval()), logits(model))


def test_state_dicts_load_both_ways(family):
    source, target = make_model(family), make_model(family)
    twell.apply(target)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(logits(target), logits(source))
    fresh = make_model(family)
    fresh.load_state_dict(target.state_dict())
    torch.testing.assert_close(logits(fresh), logits(source))
    twell.apply(fresh)
    fresh.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(logits(fresh), logits(source))


def test_restore(family):
    model = make_model(family)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    mlp_class = type(model.model.layers[0].mlp)
    twell.apply(model)
    assert twell.restore(model) == 3
    assert all(type(layer.mlp) is mlp_class for layer in model.model.layers)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert twell.restore(model) == 0


def test_copies_after_a_forward(family):
    model = make_model(family)
    twell.apply(model)
    model(TOKENS).logits.sum()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_model_in_training_and_its_frozen_weights(family):
    model = make_model(family).train()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    twell.apply(model)
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[1].mlp.down.requires_grad
    assert model.model.layers[0].mlp.down.requires_grad


def test_generate(family):
    model = make_model(family)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, **arguments)
    twell.apply(model, "twell")
    assert torch.equal(model.generate(TOKENS, **arguments), expected)


def refused(model, error, complaint):
    before = dict(model.named_modules())
    with pytest.raises(error, match=complaint):
        twell.apply(model)
    assert dict(model.named_modules()) == before


def test_another_activation_is_refused(family):
    complaint = r"model\.layers\.0\.mlp: activation 'silu' \(SiLU.*\) .* supported is 'relu'"
    refused(make_model(family, hidden_act="silu"), ValueError, complaint)


def test_a_bias_is_refused():
    model = make_model("llama", mlp_bias=True)
    refused(model, ValueError, r"model\.layers\.0\.mlp: gate_proj has a bias")


def test_a_replaced_projection_is_refused(family):
    model = make_model(family)
    model.model.layers[2].mlp.up_proj = torch.nn.Bilinear(64, 8, 136, bias=False)
    refused(model, ValueError, r"model\.layers\.2\.mlp: up_proj is a Bilinear")


def test_unloaded_weights_are_refused(family):
    with torch.device("meta"):
        model = make_model(family)
    refused(model, ValueError, r"model\.layers\.0\.mlp: gate_proj is on the meta device")


def test_an_unsupported_dtype_is_refused(family):
    model = make_model(family, torch.float16)
    refused(model, ValueError, r"model\.layers\.0\.mlp: .* dtype Half")


def test_an_unsupported_width_is_refused(family):
    model = make_model(family, intermediate_size=100)
    refused(model, ValueError, r"model\.layers\.0\.mlp: .* neurons is 100")


def test_another_model_is_refused():
    refused(torch.nn.Linear(8, 8), ValueError, "Linear holds no .* LlamaMLP, Qwen2MLP")


def test_a_wrong_result_is_found_and_undone(family, monkeypatch):
    model = make_model(family)
    expected = logits(model)
    wrong = iter([False, False, True])
    compute = twell.HuggingFaceFFN._run

    def sometimes_wrong(self, x, path):
        out = compute(self, x, path)
        return out._replace(y=out.y * 1.1) if next(wrong) else out

    monkeypatch.setattr(twell.HuggingFaceFFN, "_run", sometimes_wrong)
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.mlp: ‖y_twell − y‖"):
        twell.apply(model)
    assert not any(isinstance(m, twell.GatedFFN) for m in model.modules())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_does_not_cry_wolf(dtype):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    model = make_model("llama", dtype, **sizes)
    before = torch.get_rng_state()
    assert twell.apply(model).largest_error < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(torch.get_rng_state(), before)
