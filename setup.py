"""Builds the native CPU kernels: one shared library with a C interface, the same for every version of Python.

Each instruction set is one source file with flags of its own; which one runs is decided when the library is loaded. A compiler that does
not know some flags leaves those instruction sets out, and without any compiler the package works on torch's operators.
PENSTOCK_BUILD_NATIVE=0 leaves the library out; =1 makes a failure to build it an error (wheels are built so).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/penstock/execution/kernels/csrc")
COMMON_FLAGS = [
    "-std=c++17",
    # The kernels say themselves what is unrolled; -O3 only makes compilers take four times as long.
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
X86_MACHINES = ("x86_64", "AMD64")

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_VNNI = [*_AVX512, "-mavx512vnni"]
_BF16 = [*_VNNI, "-mavx512bf16"]
ISA_FLAGS = {
    "isa_avx2": _AVX2,
    "isa_avx_vnni": [*_AVX2, "-mavxvnni"],
    "isa_avx512": _AVX512,
    "isa_avx512_vnni": _VNNI,
    "isa_avx512_bf16": _BF16,
    "isa_amx": [*_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def flags_of(source: Path) -> list[str]:
    """Compiler flags for one source file."""
    if platform.machine() in X86_MACHINES:
        return ISA_FLAGS.get(source.stem, [])
    if platform.machine() in ("aarch64", "arm64") and sys.platform == "linux":
        return ["-march=armv8.2-a+dotprod"] if source.stem == "isa_portable" else []
    return []


class BuildNative(build_ext):
    """Compiles csrc/*.cpp in parallel and links them; the result is _native.so, without Python's version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dll" if sys.platform == "win32" else ".so"
        return os.path.join(*fullname.split(".")) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        wanted = os.environ.get("PENSTOCK_BUILD_NATIVE", "auto")
        if wanted == "0":
            return
        try:
            super().run()
        except Exception as error:
            if wanted == "1":
                raise
            print(f"penstock: built without native CPU kernels ({error}); torch's operators will be used instead.")

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX", "c++")
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            sources = [Path(source) for source in ext.sources]
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                results = pool.map(lambda source: self._compile(compiler, source, Path(folder)), sources)
            objects = [result for result in results if result is not None]
            # Written beside the target and renamed: a running process keeps the library that it has mapped.
            fresh = target.with_suffix(".new")
            subprocess.run([compiler, "-shared", "-o", str(fresh), *map(str, objects), "-pthread"], check=True)
            fresh.replace(target)

    def copy_extensions_to_source(self) -> None:
        """For editable installs: put the library beside its Python module."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.is_file():
                target = Path("src", self.get_ext_filename(ext.name))
                fresh = target.with_suffix(".new")
                shutil.copyfile(built, fresh)
                fresh.replace(target)

    def _compile(self, compiler: str, source: Path, folder: Path) -> Path | None:
        """The object file; None when the compiler does not know this instruction set's flags. Raises CalledProcessError."""
        target = folder / (source.stem + ".o")
        flags = flags_of(source)
        if source.stem in ISA_FLAGS:
            probe = subprocess.run(
                [compiler, *flags, "-x", "c++", "-E", os.devnull, "-o", os.devnull], capture_output=True, check=False
            )
            if probe.returncode:
                return None
        command = [compiler, *COMMON_FLAGS, *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        done.check_returncode()
        return target


class AnyPythonWheel(bdist_wheel):
    """The library does not use Python's own interface: one wheel per platform serves every version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "penstock.execution.kernels._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
