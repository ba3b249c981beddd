"""Running the `twell` program in tests, and small inputs for it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(os.environ.get("TWELL_BIN", ROOT / "build" / "bin" / "twell"))

needs_program = pytest.mark.skipif(not PROGRAM.exists(), reason=f"{PROGRAM} is not built")


def twell(*arguments, check=True, **keywords):
    """Runs `twell arguments…` with one thread."""
    command = [str(PROGRAM), *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **keywords)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def twell_json(*arguments):
    return json.loads(twell(*arguments, "--json").stdout)


def refusal(*arguments, code=1, **keywords):
    """The one line on stderr with which `twell arguments…` fails."""
    done = twell(*arguments, check=False, **keywords)
    lines = [line for line in done.stderr.splitlines() if line.startswith("twell: ")]
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def write_text(folder: Path, files: int = 30) -> Path:
    """C-like text in `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"int f{(i * number) % 97}(int x) {{ return x + {i}; }}\n" for i in range(60)]
        (folder / f"{number}.h").write_text("".join(lines))
    return folder


def write_tokenizer(path: Path, text: Path, size: int = 384, bos: bool = False) -> Path:
    """A byte-level BPE tokenizer trained on `text`; with `bos`, its template starts with one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", *(["<|bos|>"] if bos else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in sorted(text.iterdir())], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    tokenizer.save(str(path))
    return path
