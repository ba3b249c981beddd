"""python -m twell.train_tokenizer, and that transformers loads what it writes."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from twell import train_tokenizer as tt

TEXT = "int main() { return 0; }\n// 12345 caf\u00e9 \u65e5\u672c\n"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.h").write_text(TEXT * 20, encoding="utf-8")
    (folder / "a.h").write_text("#include <vector>\n" * 30)
    (folder / "c.jsonl").write_text('{"text": "one two"}\n\n{"text": ""}\n{"text": "three"}\n')
    (folder / "binary").write_bytes(b"a\0b")
    (folder / "latin1").write_bytes(b"caf\xe9")
    (folder / "empty").touch()
    (folder / ".hidden").write_text("x")
    return folder


def test_reads_in_order_and_counts_what_it_skips(corpus):
    documents = tt.Documents([corpus])
    texts = list(documents)
    assert texts == ["#include <vector>\n" * 30, TEXT * 20, "one two", "three"]
    assert documents.skipped == {"binary": 1, "not UTF-8": 1, "empty": 2, "hidden": 1}
    assert "skipped: 1 binary, 2 empty, 1 hidden, 1 not UTF-8" in documents.summary()


def test_stops_after_max_bytes(corpus):
    assert len(list(tt.Documents([corpus], max_bytes=10))) == 1


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("binary", b"a\0b", "binary"),
        ("latin1", b"caf\xe9", "not UTF-8"),
        ("empty", b"", "empty"),
        ("x.jsonl", b'{"text": 5}', "x.jsonl:1"),
        ("x.jsonl", b'{"text": "a"}\n{', "x.jsonl:2"),
        ("x.jsonl", b"[1]", "x.jsonl:1"),
        ("x.jsonl", b'{"text": "\\ud800"}', "x.jsonl:1"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1"),
        ("x.jsonl", b"\n", "no text found"),
    ],
)
def test_refuses_bad_files_by_name(tmp_path, name, data, part):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(tt.DataError, match=part):
        list(tt.Documents([tmp_path / name]))


def test_refuses_missing_paths_and_tiny_vocabularies(tmp_path):
    with pytest.raises(tt.DataError, match="no such file"):
        list(tt.Documents([tmp_path / "missing"]))
    with pytest.raises(ValueError, match="at least 258"):
        tt.train(["a"], 257)


def test_command_is_deterministic_and_round_trips(corpus, tmp_path):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        tt.main(["--vocab-size", "300", "--out", str(file), str(corpus)])
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = Tokenizer.from_file(str(files[0]))
    assert tokenizer.get_vocab_size() == 300
    assert (tokenizer.token_to_id(tt.BOS), tokenizer.token_to_id(tt.EOS)) == (0, 1)
    every_byte = "".join(map(chr, range(0x250))) + "\U0001f600\u65e5"
    ids = tokenizer.encode(TEXT + every_byte).ids
    assert ids[0] == 0
    assert tokenizer.decode(ids) == TEXT + every_byte
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "one.json", "two.json"]


def test_transformers_loads_it(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    tt.main(["--vocab-size", "300", "--out", str(tmp_path / "tokenizer.json"), str(corpus)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    assert tokenizer.decode(tokenizer("int main()")["input_ids"], skip_special_tokens=True) == (
        "int main()"
    )


def test_command_line_gives_one_line_and_a_status(tmp_path):
    command = [sys.executable, "-m", "twell.train_tokenizer", "--vocab-size", "300"]
    package = Path(tt.__file__).parents[1]
    for arguments, part in [
        (["--out", str(tmp_path / "t.json"), str(tmp_path / "missing")], "no such file"),
        (["--out", str(tmp_path / "no/t.json"), __file__], "cannot write"),
    ]:
        run = subprocess.run(
            command + arguments, capture_output=True, text=True, env={"PYTHONPATH": str(package)}
        )
        assert run.returncode == 1
        assert run.stderr.startswith("error: ") and part in run.stderr
        assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
