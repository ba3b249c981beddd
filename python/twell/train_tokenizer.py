"""Trains a byte-level BPE tokenizer on text and writes a tokenizer.json.

    python -m twell.train_tokenizer --vocab-size 4096 --out tokenizer.json PATH...

A PATH is a UTF-8 text file, a .jsonl file (the string "text" of each line), or a folder, whose
files are read recursively in the order of their paths. The data layout is that of `twell train`:
in folders, hidden, empty, binary and non-UTF-8 files are skipped and counted; a file that is named
itself must be usable. The same paths give the same tokenizer.

Text is cut by Llama 3's pattern. <|bos|> has id 0 and starts every encoded text; <|eos|> has id 1
and ends documents in training.
"""

import argparse
import collections
import json
import os
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS = "<|bos|>"
EOS = "<|eos|>"
BYTES = 256

# Published with Llama 3: contractions, words with the mark before them, numbers of up to three
# digits, punctuation, line breaks, white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class DataError(Exception):
    """Data that cannot be used; the message is one line for the user."""


class Documents:
    """Iterates over the documents of `paths`, counting what it reads and skips."""

    def __init__(self, paths, max_bytes=None):
        self.paths = [Path(path) for path in paths]
        self.max_bytes = max_bytes
        self.documents = 0
        self.bytes = 0
        self.skipped = collections.Counter()

    def __iter__(self):
        for path in self.paths:
            for text in self._read(path):
                self.documents += 1
                self.bytes += len(text.encode())
                yield text
                if self.max_bytes is not None and self.bytes >= self.max_bytes:
                    return
        if self.documents == 0:
            raise DataError(f"no text found in the given paths: {self.summary()}")

    def summary(self):
        text = f"{self.documents} documents, {self.bytes / 1e6:.1f} MB"
        if self.skipped:
            reasons = (f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            text += "; skipped: " + ", ".join(reasons)
        return text

    def _read(self, path):
        if path.is_dir():
            yield from self._read_folder(path)
        elif not path.exists():
            raise DataError(f"no such file or folder: {path}")
        elif not path.is_file():
            raise DataError(f"cannot read {path}: it is not a regular file")
        elif path.suffix == ".jsonl":
            yield from self._read_lines(path)
        else:
            text, problem = self._decode(path)
            if problem:
                raise DataError(
                    f"cannot use {path} as text: it is {problem}, but must be UTF-8 text"
                )
            yield text

    def _read_folder(self, folder):
        files = []
        for root, folders, names in os.walk(folder):
            for name in folders:
                if name.startswith("."):
                    self.skipped["hidden"] += 1
                elif os.path.islink(os.path.join(root, name)):
                    self.skipped["links to folders"] += 1
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(root, name)
                if name.startswith("."):
                    self.skipped["hidden"] += 1
                elif not os.path.isfile(path):
                    self.skipped["not regular files"] += 1
                elif not os.access(path, os.R_OK):
                    self.skipped["unreadable"] += 1
                else:
                    files.append(path)
        for path in map(Path, sorted(files, key=os.fsencode)):
            if path.suffix == ".jsonl":
                yield from self._read_lines(path)
                continue
            text, problem = self._decode(path)
            if problem:
                self.skipped[problem] += 1
            else:
                yield text

    def _decode(self, path):
        """The text of a file and "", or None and why it is not text."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if not data:
            return None, "empty"
        if b"\0" in data:
            return None, "binary"
        try:
            return data.decode(), ""
        except UnicodeDecodeError:
            return None, "not UTF-8"

    def _read_lines(self, path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line.decode())["text"]
                    text.encode()  # a lone surrogate is no text
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise DataError(
                        f'{path}:{number} must be a JSON object with a string "text"'
                    ) from error
                if text:
                    yield text
                else:
                    self.skipped["empty"] += 1


def train(documents, vocab_size, show_progress=False):
    """Trains on an iterable of texts; the result has `vocab_size` tokens or fewer.

    Raises ValueError if `vocab_size` leaves no room for the bytes and the two special tokens.
    """
    smallest = BYTES + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but must be at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def write(tokenizer, path):
    """Writes tokenizer.json, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m twell.train_tokenizer", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="stop reading after this much text"
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    options = parser.parse_args(arguments)
    documents = Documents(options.paths, options.max_bytes)
    try:
        tokenizer = train(documents, options.vocab_size, show_progress=sys.stderr.isatty())
        write(tokenizer, options.out)
    except (DataError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: cannot write {options.out}: {error.strerror}") from error
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens from {documents.summary()}")


if __name__ == "__main__":
    main()
