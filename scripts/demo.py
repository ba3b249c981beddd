"""The demo behind `make demo`; see scripts/demo for its settings.

Steps, each skipped if an interrupted run has already done it:

    data       train.jsonl and heldout.jsonl: the C++ headers, split by file
    tokenizer  a byte-level BPE
    model      `twell train`, a Hugging Face directory
    eval       held-out perplexity, dense and TwELL; it must agree to 4 digits
    speed      prefill and decode, dense and TwELL in turn, medians
    traces     active neurons of every token, by `twell inspect`
    sample     a continuation
    report     summary.json and report.html
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TWELL = os.environ["TWELL_BIN"]
OUT = Path(os.environ.get("TWELL_DEMO_OUT", ROOT / "runs/demo"))
SETTINGS = {
    "data": os.environ.get("TWELL_DEMO_DATA", "/usr/include"),
    "seconds": float(os.environ.get("TWELL_DEMO_SECONDS", "270")),
    "threads": min(2, len(os.sched_getaffinity(0))),
    "max_bytes": 12 << 20,
    "vocabulary": 4096,
    "model": {"layers": 4, "hidden": 256, "neurons": 2048, "heads": 4, "kv-heads": 4},
    # Small steps, so that also a slow machine makes the hundreds that steering the sparsity takes.
    "batch": {"batch": 4, "context": 256},
    "target_active": "3.5%",
}
HELDOUT_SHARE = 0.1
MAX_HELDOUT_BYTES = 1 << 20
FOUR_DIGITS = 5e-4  # half a unit of the fourth
TIMING_TURNS = 3
EOS = "<|eos|>"  # of twell.train_tokenizer; ends every document
PROMPT = "#include <vector>\n\ntemplate <class T>\nclass "


def say(text: str):
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


def fail(text: str):
    sys.exit(f"twell: {text}")


def write_json(path: Path, value):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def twell(*arguments, quiet: bool = False) -> str:
    """Runs the program and returns its answer; its progress goes to the terminal unless `quiet`."""
    command = [TWELL, *map(str, arguments)]
    messages = subprocess.PIPE if quiet else None
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=messages, text=True, check=False
    )
    if result.returncode < 0:
        fail(f"`twell {arguments[0]}` was ended by signal {-result.returncode}")
    if result.returncode > 0:  # it has said why, in its last line
        sys.exit(result.stderr.splitlines()[-1] if quiet else result.returncode)
    return result.stdout


def twell_json(*arguments, quiet: bool = False) -> dict:
    answer = twell(*arguments, "--threads", SETTINGS["threads"], "--json", quiet=quiet)
    return json.loads(answer)


def header_files(root: Path):
    """C++ headers first, then all others; a fixed order."""
    if root.is_file():
        return [root]
    suffixes = ("", ".h", ".hpp", ".hxx", ".tcc", ".cpp")
    files = (
        path
        for path in root.rglob("*")
        if path.suffix in suffixes
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    return sorted(files, key=lambda path: ("c++" not in path.parts, str(path)))


def step_data(folder: Path):
    root = Path(SETTINGS["data"])
    if not root.exists():
        fail(f"{root} does not exist; set TWELL_DEMO_DATA to a folder with text")
    train, heldout, sizes, seen = [], [], Counter(), set()
    for path in header_files(root):
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        except (OSError, UnicodeDecodeError):
            continue  # a dangling link, an unreadable or foreign file
        digest = hashlib.sha256(text.encode()).digest()
        if "\0" in text or not text.strip() or digest in seen:
            continue
        seen.add(digest)
        is_heldout = digest[0] < 256 * HELDOUT_SHARE  # by content: the same on every machine
        if is_heldout and sizes["heldout"] >= MAX_HELDOUT_BYTES:
            continue
        sizes["heldout" if is_heldout else "train"] += len(text)
        (heldout if is_heldout else train).append(json.dumps({"text": text}) + "\n")
        if sizes["train"] >= SETTINGS["max_bytes"]:
            break
    if not heldout and len(train) > 1:
        heldout.append(train.pop())
    if not heldout:
        fail(f"{root} has too little text to train on: {len(seen)} files")
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(train))
    (folder / "heldout.jsonl").write_text("".join(heldout))
    print(
        f"{len(train)} files, {sizes['train'] / 1e6:.1f} MB to train on;"
        f" {len(heldout)} files, {sizes['heldout'] / 1e6:.1f} MB held out"
    )


def step_tokenizer(folder: Path):
    folder.mkdir()
    command = [sys.executable, "-m", "twell.train_tokenizer", OUT / "data/train.jsonl"]
    command += ["--vocab-size", str(SETTINGS["vocabulary"]), "--out", folder / "tokenizer.json"]
    if subprocess.run(command, check=False).returncode != 0:
        fail("the tokenizer could not be trained (its message is above)")


def train_model():
    """Not a plain step: a half-trained model is resumed, not thrown away."""
    folder = OUT / "model"
    if (folder / "summary.json").exists():
        return
    say(f"model: training towards {SETTINGS['target_active']} active neurons")
    if (folder / "checkpoint.safetensors").exists():
        print(twell("train", "--resume", "--out", folder, "--threads", SETTINGS["threads"]), end="")
        return
    shutil.rmtree(folder, ignore_errors=True)
    flags = {
        "data": OUT / "data/train.jsonl",
        "tokenizer": OUT / "tokenizer/tokenizer.json",
        "eos": EOS,
        "heldout": 0.02,
        "max-seconds": SETTINGS["seconds"],
        "target-active": SETTINGS["target_active"],
        "threads": SETTINGS["threads"],
        **SETTINGS["model"],
        **SETTINGS["batch"],
    }
    parts = [part for name, value in flags.items() for part in (f"--{name}", value)]
    print(twell("train", "--out", folder, *parts), end="")


def step_eval() -> dict:
    flags = ("eval", "--model", OUT / "model", "--data", OUT / "data/heldout.jsonl")
    dense = twell_json(*flags, "--ffn", "dense")
    sparse = twell_json(*flags, "--ffn", "twell")
    if not math.isclose(dense["perplexity"], sparse["perplexity"], rel_tol=FOUR_DIGITS):
        fail(f"perplexity differs: dense {dense['perplexity']}, TwELL {sparse['perplexity']}")
    return {"dense": dense, "twell": sparse, "unigram_loss": unigram_loss()}


def unigram_loss() -> float:
    """Nats per held-out token of a model that knows only how frequent each token is."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(OUT / "tokenizer/tokenizer.json"))

    def counts(name):
        lines = (OUT / "data" / name).read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        counted = Counter(token for encoding in encodings for token in encoding.ids)
        return counted + Counter({tokenizer.token_to_id(EOS): len(texts)})

    train, heldout = counts("train.jsonl"), counts("heldout.jsonl")
    total = sum(train.values()) + tokenizer.get_vocab_size()  # each count plus one
    nats = sum(n * -math.log((train[token] + 1) / total) for token, n in heldout.items())
    return nats / sum(heldout.values())


def step_speed() -> dict:
    """Tokens per second of the whole model, dense and TwELL in turn; medians over the turns."""
    prefill = ("eval", "--model", OUT / "model", "--data", OUT / "data/heldout.jsonl")
    prefill += ("--max-tokens", 16384)
    decode = ("generate", "--model", OUT / "model", "--prompt", PROMPT, "--temperature", 0)
    decode += ("--max-tokens", 200)
    rates = {"prefill": {}, "decode": {}}
    for _ in range(TIMING_TURNS):
        for ffn in ("dense", "twell"):
            answer = twell_json(*prefill, "--ffn", ffn, quiet=True)
            rates["prefill"].setdefault(ffn, []).append(answer["tokens_per_second"])
            answer = twell_json(*decode, "--ffn", ffn, quiet=True)
            rates["decode"].setdefault(ffn, []).append(answer["decode_tokens_per_second"])
    return {
        job: {ffn: statistics.median(values) for ffn, values in by_ffn.items()}
        for job, by_ffn in rates.items()
    }


def step_traces(folder: Path):
    flags = ("inspect", "--model", OUT / "model", "--data", OUT / "data/heldout.jsonl")
    report = twell_json(*flags, "--max-tokens", 16384, "--save-trace", folder)
    write_json(folder / "inspect.json", report)


def step_sample() -> dict:
    flags = ("--prompt", PROMPT, "--max-tokens", 160, "--temperature", 0.7, "--seed", 7)
    return twell_json("generate", "--model", OUT / "model", *flags, "--ffn", "twell")


def once(title: str, path: Path, work):
    """Runs `work` unless an earlier run left `path`, which appears whole or not at all: a step
    either returns what is to be written there or fills the folder it is given."""
    if path.exists():
        return
    say(title)
    if path.suffix == ".json":
        write_json(path, work())
        return
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    work(unfinished)
    unfinished.replace(path)


def summary() -> dict:
    read = {name: json.loads((OUT / f"{name}.json").read_text()) for name in ("eval", "speed")}
    dense, sparse = read["eval"]["dense"], read["eval"]["twell"]
    ratio = {job: rates["twell"] / rates["dense"] for job, rates in read["speed"].items()}
    return {
        "heldout_loss": dense["loss"],
        "unigram_loss": read["eval"]["unigram_loss"],
        "loss_unit": "nats per token",
        "active_share": sparse["active_share"],
        "dense_perplexity": dense["perplexity"],
        "twell_perplexity": sparse["perplexity"],
        "prefill_ratio": ratio["prefill"],
        "decode_ratio": ratio["decode"],
        "train_seconds": json.loads((OUT / "model/summary.json").read_text())["train_seconds"],
    }


def print_table(result: dict):
    speed = json.loads((OUT / "speed.json").read_text())
    say(f"\n{'':24}{'dense':>12}{'TwELL':>12}{'ratio':>8}")
    print(
        f"{'held-out perplexity':24}{result['dense_perplexity']:12.3f}"
        f"{result['twell_perplexity']:12.3f}"
    )
    for job, rates in speed.items():
        print(
            f"{job + ', tokens/s':24}{rates['dense']:12,.0f}{rates['twell']:12,.0f}"
            f"{result[f'{job}_ratio']:8.2f}"
        )
    print(
        f"\n{100 * result['active_share']:.1f}% of the neurons active per token; held-out loss"
        f" {result['heldout_loss']:.3f} nats per token, {result['unigram_loss']:.3f} by token"
        f" frequency alone\nreport: {OUT / 'report.html'}"
    )


def run():
    settings = OUT / "settings.json"
    finished = (OUT / "summary.json").exists()
    same = settings.exists() and json.loads(settings.read_text()) == SETTINGS
    if finished or not same:
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir(parents=True)
        write_json(settings, SETTINGS)
    else:
        say("continuing the demo that was interrupted")

    once("data: C++ headers", OUT / "data", step_data)
    once("tokenizer: byte-level BPE", OUT / "tokenizer", step_tokenizer)
    train_model()
    once("eval: held-out perplexity", OUT / "eval.json", step_eval)
    once("speed: prefill and decode", OUT / "speed.json", step_speed)
    once("traces: where it is sparse", OUT / "traces", step_traces)
    once("sample", OUT / "sample.json", step_sample)
    sample = json.loads((OUT / "sample.json").read_text())
    print(f"{sample['prompt']}{sample['text']}")

    result = summary()
    write_json(OUT / "results.json", result)
    say("report")
    if (
        subprocess.run([sys.executable, ROOT / "scripts/report.py", OUT], check=False).returncode
        != 0
    ):
        fail("the report could not be drawn (its message is above)")
    (OUT / "results.json").replace(OUT / "summary.json")  # last: marks the run as finished
    print_table(result)


def main():
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.with_name(OUT.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another demo is writing to {OUT}; wait for it, or set TWELL_DEMO_OUT")
        try:
            run()
        except KeyboardInterrupt:
            fail("interrupted; `make demo` goes on from here")
        except OSError as error:
            fail(f"{error.filename or OUT}: {error.strerror}")


if __name__ == "__main__":
    main()
