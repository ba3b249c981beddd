"""What the documents say is true: their examples run, their figures are those of the files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"{document} has no {language} example"
    return found


def test_python_examples_run():
    for block in blocks("README.md", "python"):
        subprocess.run([sys.executable, "-c", block], check=True, timeout=300)


def test_cpp_examples_compile_and_run(tmp_path):
    if "TWELL_BIN" not in os.environ:
        pytest.skip("TWELL_BIN, set by scripts/test, says where the build is")
    package = Path(os.environ["TWELL_BIN"]).parents[1] / "twell.pc"
    pkg_config = ["pkg-config", "--cflags", "--libs", package]
    needs = subprocess.run(pkg_config, check=True, capture_output=True, text=True).stdout.split()
    for i, block in enumerate(blocks("README.md", "cpp")):
        source = tmp_path / f"example{i}.cpp"
        source.write_text(block)
        program = tmp_path / f"example{i}"
        compile_strictly = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror"]
        command = [*compile_strictly, source, *needs, "-o", program]
        subprocess.run(command, check=True, timeout=300)
        answer = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
        assert answer.stdout == "ok: y[0] = 0.5243\n"


def test_links_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_figures_are_those_of_the_result_files():
    command = [sys.executable, ROOT / "scripts/figures.py", "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stderr
