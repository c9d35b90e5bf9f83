"""How genkern._C is built: every CPU kernel once per instruction-set level, CUDA where nvcc is.

No torch header or library takes part, so pip's build isolation just works and a torch upgrade
breaks nothing. Ninja does the building, in build/, which stays: a second `pip install -e .`
recompiles what changed. What was built, and why anything is missing, goes into the module
(`genkern info`).

Environment:
  CXX                  the C++ compiler (default: c++)
  GENKERN_CUDA         auto (default): the CUDA half where an nvcc is found; 0: never; 1: it must be
                       built, with an nvcc from PyPI where the machine has none
  GENKERN_CUDA_ARCHS   "all", or a list such as "80;90" (default: the visible GPU's, else 80)
  CUDA_HOME            where to look for nvcc before PATH
"""

import gzip
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Vector width and flags of each level; a level whose flags the compiler refuses is left out.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
LEVELS = {"portable": (16, [])}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": (32, AVX2), "avx512": (64, AVX512), "amx": (64, AMX)}

# Hidden names: calls inside the module are direct, and nothing clashes with torch.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# GCC 12 warns about its own intrinsics headers.
CXX_FLAGS += ["-Wall", "-Wno-maybe-uninitialized"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--cudart=static"]
# What needs more than the oldest: elsewhere the op's other backends do it.
OLDEST_ARCH = {"attention": 80}
# The PTX that is shipped, for genkern/ptx to execute: of the oldest architecture with everything.
PTX_ARCH = "80"
ALL_CUDA_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]
# PyPI's nvcc with its parts, for GENKERN_CUDA=1 on a machine that has none.
PYPI_NVCC = [
    "nvidia-cuda-nvcc>=13,<14",
    "nvidia-cuda-crt>=13,<14",
    "nvidia-nvvm>=13,<14",
    "nvidia-cuda-runtime>=13,<14",
    "nvidia-cuda-cccl>=13,<14",
]


def run(command):
    """Runs a command; (succeeded, its output)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def compiles(compiler, flags, source, suffix=".cpp"):
    """Whether `compiler` turns `source` into an object with `flags`, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"try{suffix}"
        file.write_text(source)
        return run([*compiler, *flags, "-c", str(file), "-o", str(file.with_suffix(".o"))])


def find_nvcc():
    """nvcc of CUDA_HOME, then of PATH, then of a PyPI package; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        return on_path
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        for nvcc in sorted(Path(folder).glob("*/bin/nvcc")):
            nvcc.chmod(nvcc.stat().st_mode | 0o111)
            return str(nvcc)
    return None


def cuda_wish():
    wish = os.environ.get("GENKERN_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"GENKERN_CUDA must be 0, 1 or auto, not {wish!r}")
    return wish


def cuda_archs(nvcc):
    """The compute capabilities to build for, as ["80", ...], and where they came from."""
    wish = os.environ.get("GENKERN_CUDA_ARCHS", "")
    known = [line.rpartition("_")[2] for line in run([nvcc, "--list-gpu-arch"])[1].split()]
    if wish == "all":
        return [arch for arch in ALL_CUDA_ARCHS if arch in known], "GENKERN_CUDA_ARCHS=all"
    if wish:
        archs = [a.strip().replace(".", "") for a in wish.replace(",", ";").split(";") if a.strip()]
        for arch in archs:
            if arch not in known:
                sys.exit(
                    f"GENKERN_CUDA_ARCHS names {arch!r}, which {nvcc} does not know; "
                    f"it knows {', '.join(known)}"
                )
        return archs, "GENKERN_CUDA_ARCHS"
    found, said = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    visible = sorted({line.strip().replace(".", "") for line in said.split("\n") if line.strip()})
    if found and visible and all(arch in known for arch in visible):
        return visible, "the visible GPU"
    return ["80"], "the default, no GPU being visible"


class Plan:
    """What this machine's compilers can build, and a sentence for each thing that they can't."""

    def __init__(self):
        self.cxx = shlex.split(os.environ.get("CXX", "c++"))
        works, said = compiles(self.cxx, CXX_FLAGS, "int main() {}")
        if not works:
            sys.exit(
                f"genkern needs a C++17 compiler with GCC's or Clang's vector extensions, and "
                f"{' '.join(self.cxx)!r} does not work here (set CXX to another): {said.strip()}"
            )
        self.missing = {}
        self.levels = {}
        for name, (width, flags) in LEVELS.items():
            works, said = compiles(self.cxx, [*CXX_FLAGS, *flags], "#include <stdint.h>\n")
            if works:
                self.levels[name] = (width, flags)
            else:
                self.missing[name] = f"the compiler refuses {' '.join(flags)}"
        openmp = "#include <omp.h>\nint n() { return omp_get_max_threads(); }"
        works, said = compiles(self.cxx, [*CXX_FLAGS, "-fopenmp"], openmp)
        self.openmp = ["-fopenmp"] if works else []
        if not works:
            self.missing["openmp"] = "the compiler has no OpenMP: kernels run on one thread"
        self.plan_cuda()

    def plan_cuda(self):
        self.nvcc, self.archs = None, []
        wish = cuda_wish()
        if wish == "0":
            self.missing["cuda"] = "GENKERN_CUDA=0"
            return
        nvcc = find_nvcc()
        if nvcc is None:
            problem = "no nvcc in CUDA_HOME or on PATH"
        else:
            probe = "#include <cuda_bf16.h>\n__global__ void k() {}\n"
            host = ["-ccbin", self.cxx[-1]]
            works, said = compiles([nvcc, *host], CUDA_FLAGS, probe, ".cu")
            problem = None if works else f"{nvcc} does not work: {' '.join(said.split())[:300]}"
        if problem is None:
            self.nvcc = nvcc
            self.archs, self.archs_from = cuda_archs(nvcc)
        elif wish == "1":
            sys.exit(
                f"GENKERN_CUDA=1 asks for the CUDA kernels, but they can't be built: {problem}"
            )
        else:
            self.missing["cuda"] = problem

    def info(self):
        """What `genkern info` shows, fixed at build time."""
        info = {
            "compiler": run([*self.cxx, "--version"])[1].splitlines()[0],
            "levels": list(self.levels),
            "openmp": bool(self.openmp),
            "missing": self.missing,
            "cuda": None,
        }
        if self.nvcc:
            version = run([self.nvcc, "--version"])[1].split("release ")[-1].split(",")[0]
            targets = [f"sm_{arch}" for arch in self.archs] + [f"compute_{self.archs[-1]} PTX"]
            info["cuda"] = {"nvcc": version, "targets": targets, "chosen": self.archs_from}
        return info


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def stable_pybind11(folder):
    """A copy of pybind11's headers under build/: pip's isolated environment has a new path every
    time, and a new include path would recompile the bindings every time."""
    import pybind11

    copy = folder / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        shutil.copytree(pybind11.get_include(), copy.with_suffix(".part"), dirs_exist_ok=True)
        copy.with_suffix(".part").rename(copy)
    return copy


def code_for(archs):
    """nvcc's options for machine code of each, and for PTX of the newest."""
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*code, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def write_ninja(plan, folder, target):
    """build.ninja: kernels × levels, what is compiled once, CUDA, the link."""
    from ninja import ninja_syntax

    have = [f"-DGK_HAVE_{name.upper()}" for name in plan.levels if name != "portable"]
    have += ["-DGK_HAVE_CUDA"] if plan.nvcc else []
    include = [f"-I{CSRC}"]
    python = [f"-I{folder}", f"-I{sysconfig.get_path('include')}"]
    python += [f"-isystem {stable_pybind11(folder)}"]
    info = json.dumps(json.dumps(plan.info()))
    write_if_changed(folder / "build_info.h", f"#pragma once\n#define GK_BUILD_INFO {info}\n")

    path = folder / "build.ninja.new"
    with path.open("w") as file:
        n = ninja_syntax.Writer(file)
        n.rule(
            "cxx",
            f"{shlex.join(plan.cxx)} {' '.join(CXX_FLAGS)} -MMD -MF $out.d $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="C++ $out",
        )
        objects = []

        def compile_cxx(source, out, flags):
            n.build(out, "cxx", str(source), variables={"flags": " ".join([*include, *flags])})
            objects.append(out)

        compile_cxx(CSRC / "bindings.cpp", "bindings.o", [*python, *have])
        for source in sorted(CSRC.glob("common/*.cpp")):
            compile_cxx(source, f"common/{source.stem}.o", have)
        kernels = [s for s in sorted(CSRC.glob("*/*.cpp")) if s.parent.name != "common"]
        for source in kernels:
            for level, (width, flags) in plan.levels.items():
                # Kernels throw nothing, and what unwinding brings would be shared among levels.
                chosen = [f"-DGK_LEVEL={level}", f"-DGK_VECTOR_BYTES={width}", "-fno-exceptions"]
                chosen += flags
                out = f"{source.parent.name}/{source.stem}.{level}.o"
                compile_cxx(source, out, [*chosen, *plan.openmp, *have])

        if plan.nvcc:
            nvcc = f"{plan.nvcc} -ccbin {plan.cxx[-1]} {' '.join([*CUDA_FLAGS, *include, *have])}"
            # nvcc keeps the PTX that is on its way to an object; where the one that is shipped is
            # not among it, it is made beside.
            n.rule(
                "cuda",
                f"mkdir -p $out.kept && {nvcc} $generate --keep --keep-dir $out.kept "
                f"-MD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="CUDA $out",
            )
            n.rule(
                "ptx",
                f"{nvcc} -arch=compute_{PTX_ARCH} -MD -MF $out.d -ptx $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="PTX $out",
            )
            n.rule("copy", "cp $in $out", description="PTX $out")
            for source in sorted(CSRC.glob("*/*.cu")):
                op, name = source.parent.name, source.stem
                out, ptx = f"{op}/{name}.cu.o", f"ptx/{op}.{name}.ptx"
                archs = [a for a in plan.archs if int(a) >= OLDEST_ARCH.get(op, 0)] or [PTX_ARCH]
                code = {"generate": code_for(archs)}
                objects.append(out)
                if PTX_ARCH in archs:
                    suffix = f".compute_{PTX_ARCH}.ptx" if len(archs) > 1 else ".ptx"
                    kept = f"{out}.kept/{name}{suffix}"
                    n.build(out, "cuda", str(source), implicit_outputs=kept, variables=code)
                    n.build(ptx, "copy", kept)
                else:
                    n.build(out, "cuda", str(source), variables=code)
                    n.build(ptx, "ptx", str(source))
            # nvcc links, because it knows where its own runtime library is. What registers kernels
            # goes through csrc/common/launch.cpp, which keeps their names.
            openmp = "-Xcompiler=-fopenmp" if plan.openmp else ""
            link = (
                f"{plan.nvcc} -ccbin {plan.cxx[-1]} --cudart=static -shared {openmp} "
                f"-Xlinker --wrap=__cudaRegisterFunction $in -o $out"
            )
        else:
            shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
            link = f"{shlex.join(plan.cxx)} {shared} {' '.join(plan.openmp)} $in -o $out"
        n.rule("link", link, description="link $out")
        n.build(target, "link", objects)
    write_if_changed(folder / "build.ninja", path.read_text())
    path.unlink()


class BuildKernels(build_ext):
    def build_extension(self, extension):
        import ninja

        folder = ROOT / "build" / f"kernels-{sysconfig.get_platform()}-{sys.version_info[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan()
        write_ninja(plan, folder, "_C.so")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if self.verbose > 1:
            command.append("-v")
        if subprocess.run(command).returncode:
            sys.exit("genkern's kernels did not compile: the compiler's message stands above")
        built = Path(self.get_ext_fullpath(extension.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        # Beside, then renamed: a process that has the old module mapped keeps it.
        shutil.copy2(folder / "_C.so", built.with_suffix(".part"))
        os.replace(built.with_suffix(".part"), built)
        # What setuptools copies of an editable installation is only the module.
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "genkern" if in_place else built.parent
        ship_ptx(plan, folder / "ptx", package / "ptx" / "shipped")


def ship_ptx(plan, made, shipped):
    """The kernels' PTX, compressed, into the package; none where CUDA was not built."""
    if shipped.exists():
        shutil.rmtree(shipped)
    for source in sorted(CSRC.glob("*/*.cu")) if plan.nvcc else []:
        name = f"{source.parent.name}.{source.stem}.ptx"
        shipped.mkdir(parents=True, exist_ok=True)
        packed = gzip.compress((made / name).read_bytes(), mtime=0)
        (shipped / f"{name}.gz").write_bytes(packed)


setup(
    ext_modules=[Extension("genkern._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    # setuptools hands these to pip as build requirements of this very build.
    setup_requires=PYPI_NVCC if cuda_wish() == "1" and find_nvcc() is None else [],
)
