"""`make demo`, small: minutes of it in seconds, on the program's own sources."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "heldout_loss", "unigram_loss", "loss_unit", "active_share", "dense_perplexity",
    "twell_perplexity", "prefill_ratio", "decode_ratio", "train_seconds",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    "TWELL_BIN" not in os.environ, reason="TWELL_BIN, set by scripts/test, says where twell is"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"

    def run(**settings):
        environment = {
            **os.environ,
            "TWELL_DEMO_OUT": str(out),
            "TWELL_DEMO_DATA": str(ROOT / "app"),
            "TWELL_DEMO_SECONDS": "20",
            **settings,
        }
        return subprocess.run(
            [ROOT / "scripts/demo"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )

    first = run()
    assert first.returncode == 0, first.stderr
    return out, run


def test_summary(demo):
    out, _ = demo
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == KEYS
    # Seconds of training are a few steps on a busy machine: it need not have learnt much.
    assert 0 < summary["heldout_loss"] < 1.5 * summary["unigram_loss"]
    assert summary["dense_perplexity"] == pytest.approx(summary["twell_perplexity"], rel=5e-4)
    assert 0 < summary["active_share"] < 0.7
    assert summary["train_seconds"] < 60


def test_report_is_one_file(demo):
    out, _ = demo
    page = (out / "report.html").read_text()
    assert page.count("<svg ") == 4
    for foreign in ('src="', "url(http", "@import", "<script", "<link"):
        assert foreign not in page
    assert "prefers-color-scheme: dark" in page


def test_goes_on_where_it_was_interrupted(demo):
    out, run = demo
    model = (out / "model/model.safetensors").stat()
    (out / "summary.json").unlink()
    (out / "speed.json").unlink()
    answer = run()
    assert answer.returncode == 0, answer.stderr
    assert "continuing the demo" in answer.stdout
    assert (out / "model/model.safetensors").stat() == model  # not trained again
    assert set(json.loads((out / "summary.json").read_text())) == KEYS


def test_missing_data_is_one_clear_line(tmp_path):
    environment = {**os.environ, "TWELL_DEMO_OUT": str(tmp_path / "run")}
    environment["TWELL_DEMO_DATA"] = str(tmp_path / "nothing")
    answer = subprocess.run(
        [ROOT / "scripts/demo"], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"twell: {tmp_path}/nothing does not exist")
