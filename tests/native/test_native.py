"""The launchers on many threads, under ThreadSanitizer, AddressSanitizer and UBSan.

Each <op>_threads.cpp is built here with csrc/<op> and no torch, as setup.py builds it but without
OpenMP: a sanitizer does not understand GCC's. The portable level, and this machine's highest.
"""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from genkern._native import native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DRIVERS = sorted(Path(__file__).parent.glob("*_threads.cpp"))
# The least optimisation that compiles fast: UBSan's checks of -O1 take ten times as long.
SANITIZERS = {
    "thread": ["-O1", "-fsanitize=thread"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
# Scratch memory arrives full of NaN.
OPTIONS = {"ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255"}


@pytest.fixture(scope="module")
def build_rules():
    """setup.py as a module: its levels and flags, nothing set up."""
    setuptools = pytest.importorskip("setuptools")
    if not CSRC.exists():
        pytest.skip("csrc/ is not beside the tests")
    spec = importlib.util.spec_from_file_location("genkern_setup", ROOT / "setup.py")
    rules = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec.loader.exec_module(rules)
    return rules


def run(command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **OPTIONS, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def runner(compiler, sanitize, folder):
    """What programs are started with here. ThreadSanitizer of older compilers wants its addresses
    where a kernel's randomisation may not leave them."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}")
    status, said = run([compiler, *sanitize, source, "-o", program])
    if status:
        pytest.skip(f"{compiler} has no {sanitize[1]} here: {said.strip()[-300:]}")
    for start in ([], ["setarch", "-R"]):
        if not start or shutil.which(start[0]):
            status, said = run([*start, program])
            if status == 0:
                return start
    pytest.skip(f"programs of {sanitize[1]} do not start here: {said.strip()[-300:]}")


def build(driver, rules, compiler, sanitize, levels, folder):
    kernels = sorted((CSRC / driver.stem.removesuffix("_threads")).glob("*.cpp"))
    assert kernels, f"{driver.name} is not named after a folder of csrc/"
    have = [f"-DGK_HAVE_{level.upper()}" for level in levels if level != "portable"]
    common = [compiler, "-std=c++17", "-g1", "-fno-math-errno", *sanitize, *have]

    def compile_kernel(which):
        kernel, level = which
        width, flags = rules.LEVELS[level]
        chosen = [f"-DGK_LEVEL={level}", f"-DGK_VECTOR_BYTES={width}", *flags]
        built = folder / f"{kernel.stem}.{level}.o"
        status, said = run([*common, *chosen, "-w", "-c", kernel, "-o", built])
        assert status == 0, said
        return built

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_kernel, [(k, n) for n in levels for k in kernels]))
    program = folder / driver.stem
    sources = [driver, CSRC / "common" / "levels.cpp"]
    include = f"-I{CSRC}"
    status, said = run([*common, include, *sources, *objects, "-pthread", "-o", program])
    assert status == 0, said
    return program


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.stem)
def test_sanitizers_find_nothing(driver, sanitizer, build_rules, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    sanitize = SANITIZERS[sanitizer]
    start = runner(compiler, sanitize, tmp_path)
    levels = list(dict.fromkeys(["portable", native.cpu_levels()[-1]]))
    program = build(driver, build_rules, compiler, sanitize, levels, tmp_path)
    for level in levels:
        status, said = run([*start, program, level])
        assert status == 0 and said.endswith("the same bits\n"), said[-5000:]
