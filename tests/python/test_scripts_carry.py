"""scripts/carry: the program runs where the folders it was linked against are not."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from program import PROGRAM, ROOT, needs_program


@needs_program
def test_the_carried_program_needs_only_the_torch_of_python3(tmp_path):
    out = tmp_path / "carried"
    environment = {**os.environ, "TWELL_BUILD": str(PROGRAM.parents[1])}
    subprocess.run([ROOT / "scripts/carry", out], check=True, env=environment, timeout=60)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40 << 20

    # As if built elsewhere: the folders that the linker has noted do not exist.
    libraries = bytes(Path(torch.__file__).parent / "lib")
    for file in files:
        data = file.read_bytes()
        for noted in (libraries, bytes(ROOT / "python/twell")):
            data = data.replace(noted, b"/nowhere".ljust(len(noted), b"/"))
        file.write_bytes(data)
    assert libraries not in (out / "bin/twell").read_bytes()

    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [out / "twell", "bench", "ffn", "--density", "0.1", "--tokens", "2"]
    command += ["--hidden", "64", "--neurons", "128", "--seconds", "0"]
    done = subprocess.run(
        command, env={"PATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
    if (out / "bin/twell_app_tests").exists():
        command = [out / "twell_app_tests", "--gtest_filter=Schedule.*"]
        done = subprocess.run(
            command, env={"PATH": path}, capture_output=True, text=True, check=True
        )
        assert "[  PASSED  ] 1 test." in done.stdout

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/python3").symlink_to("/bin/false")
    env = {"PATH": f"{tmp_path / 'empty'}:/usr/bin:/bin"}
    done = subprocess.run([out / "twell"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "twell: python3 has no PyTorch\n"
