"""`twell eval` and `twell generate` on directories that `transformers` wrote."""

import math

import pytest
import torch
from program import needs_program, refusal, twell, twell_json, write_text, write_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

pytestmark = needs_program

TEXT = "int f1(int x) { return x + 3; }\nint f2(int x) { return x + 4; }\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_tokenizer(folder / "tokenizer.json", write_text(folder / "text"))


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """As Llama's, it starts a text with a bos token; Qwen2's does not."""
    folder = tmp_path_factory.mktemp("llama_tokenizer")
    return write_tokenizer(folder / "tokenizer.json", write_text(folder / "text"), bos=True)


def encode(tokenizer, text):
    return Tokenizer.from_file(str(tokenizer)).encode(text).ids


def write_model(folder, tokenizer, kind="llama", tied=False, activation="relu", **changes):
    """A random model by transformers, in `folder`."""
    torch.manual_seed(3)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    fields = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "hidden_act": activation,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = model(config(**(fields | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_logits_equal_transformers(tmp_path, tokenizer, llama_tokenizer, kind, tied, activation):
    tokenizer = llama_tokenizer if kind == "llama" else tokenizer
    model = write_model(tmp_path, tokenizer, kind, tied, activation)
    data = tmp_path / "data.txt"
    data.write_text(TEXT)
    ids = torch.tensor([*encode(tokenizer, TEXT), 0])
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(theirs[:-1], ids[1:]).item()
    for ffn in ["dense", "twell", "auto"] if activation == "relu" else ["dense", "auto"]:
        report = twell_json(
            "eval", "--model", tmp_path, "--data", data, "--ffn", ffn, "--dtype", "float32",
            "--save-logits", tmp_path / "logits.safetensors",
        )  # fmt: skip
        ours = load_file(tmp_path / "logits.safetensors")
        assert ours["tokens"].tolist() == ids.tolist()
        torch.testing.assert_close(ours["logits"], theirs, rtol=1e-3, atol=1e-3)
        assert math.isclose(report["loss"], loss, rel_tol=1e-4)
        assert report["tokens"] == len(ids) - 1


def test_llama3_frequencies(tmp_path, tokenizer):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = write_model(tmp_path, tokenizer, rope_parameters=scaling)
    data = tmp_path / "data.txt"
    data.write_text(TEXT)
    path = tmp_path / "logits.safetensors"
    twell("eval", "--model", tmp_path, "--data", data, "--dtype", "float32", "--save-logits", path)
    ours = load_file(path)
    with torch.no_grad():
        theirs = model(ours["tokens"][None]).logits[0]
    torch.testing.assert_close(ours["logits"], theirs, rtol=1e-3, atol=1e-3)


def test_greedy_generation_equals_transformers(tmp_path, tokenizer):
    model = write_model(tmp_path, tokenizer)
    ids = torch.tensor([encode(tokenizer, TEXT)])
    want = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    for ffn in ("dense", "twell"):
        report = twell_json(
            "generate", "--model", tmp_path, "--prompt", TEXT, "--max-tokens", 20,
            "--temperature", 0, "--dtype", "float32", "--ffn", ffn,
        )  # fmt: skip
        assert report["ids"] == [i for i in want if i != 0]
        assert report["prompt_tokens"] == ids.shape[1]
        assert report["prefill_tokens_per_second"] > 0
        assert report["decode_tokens_per_second"] > 0


def test_streams_what_json_reports(tmp_path, tokenizer):
    write_model(tmp_path, tokenizer)
    arguments = ["generate", "--model", tmp_path, "--prompt", "int "]
    arguments += ["--max-tokens", 30, "--top-k", 50, "--top-p", 0.9]
    report = twell_json(*arguments, "--seed", 4)
    again = twell_json(*arguments, "--seed", 4)
    assert report["ids"] == again["ids"] and len(report["ids"]) <= 30
    done = twell(*arguments, "--seed", 4)
    assert done.stdout == "int " + report["text"] + "\n"
    assert "prefill" in done.stderr and "decode" in done.stderr
    assert report["ids"] != twell_json(*arguments, "--seed", 5)["ids"]


def test_stops_at_eos_and_at_the_context(tmp_path, tokenizer):
    model = write_model(tmp_path, tokenizer, tied=True)
    report = twell_json("generate", "--model", tmp_path, "--prompt", "int", "--max-tokens", 1000)
    if report["stopped"] != "eos":
        assert report["stopped"] == "context full"
        assert report["prompt_tokens"] + report["tokens"] == 128
    # With the likeliest next token as eos, it stops before the first.
    ids = encode(tokenizer, "int")
    with torch.no_grad():
        model.config.eos_token_id = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(tmp_path)
    report = twell_json("generate", "--model", tmp_path, "--prompt", "int", "--temperature", 0)
    assert report["stopped"] == "eos" and report["tokens"] == 0 and report["text"] == ""
    line = refusal("generate", "--model", tmp_path, "--prompt", "int f(x); " * 100)
    assert "128" in line


def test_silu_is_refused_by_name_with_twell(tmp_path, tokenizer):
    write_model(tmp_path, tokenizer, activation="silu")
    for command in (
        ["generate", "--prompt", "int"],
        ["eval", "--data", tokenizer],
    ):
        line = refusal(*command, "--model", tmp_path, "--ffn", "twell")
        assert "silu" in line and "--ffn dense" in line
    assert twell_json("generate", "--model", tmp_path, "--prompt", "int")["tokens"] >= 0


def test_bad_models_are_named(tmp_path, tokenizer):
    write_model(tmp_path, tokenizer)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refusal("generate", "--model", tmp_path, "--prompt", "x")
    weights.write_bytes(whole)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"intermediate_size": 136', '"intermediate_size": 144'))
    line = refusal("generate", "--model", tmp_path, "--prompt", "x")
    assert "mlp" in line and "136" in line and "144" in line
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    assert "model.layers.1" in refusal("generate", "--model", tmp_path, "--prompt", "x")
    config.write_text("{")
    assert "config.json" in refusal("generate", "--model", tmp_path, "--prompt", "x")
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refusal("generate", "--model", nowhere, "--prompt", "x")
    assert "--prompt" in refusal("generate", "--model", tmp_path, code=2)
