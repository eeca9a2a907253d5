"""Builds csrc/ with CMake and Ninja against the installed torch's headers; everything else stands in pyproject.toml.

Environment:
    GRIT_KERNELS_NO_EXTENSION=1   install pure Python (the CPU ops then run their plain torch reference)
    GRIT_KERNELS_CUDA=1 | 0       require | leave out the CUDA library; unset: built when nvcc is found
    GRIT_KERNELS_SANITIZE=1       build with ASan and UBSan (see `make asan`)
    MAX_JOBS                      parallel compile jobs
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
MINIMUM_SETUPTOOLS = 77
MINIMUM_TORCH = (2, 11)
ALTERNATIVE = "GRIT_KERNELS_NO_EXTENSION=1 installs without it (CPU ops then run their slow plain torch reference)"


def flag(name: str) -> bool | None:
    """True, False or unset (None)."""
    value = os.environ.get(name, "").lower()
    return None if value == "" else value not in ("0", "false", "off", "no")


def stop(message: str) -> None:
    sys.exit(f"\ngrit_kernels: {message}\n")


# without build isolation nothing else holds pip to pyproject.toml, and venv of Python 3.10 and 3.11 installs 65.5
if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
    stop(f"setuptools {setuptools.__version__} is too old. `pip install 'setuptools>={MINIMUM_SETUPTOOLS}'`")

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402


def torch_include() -> Path:
    try:
        import torch
    except ImportError:
        stop(
            "torch is not installed in the environment that builds. Install torch >= 2.11 first, "
            "then `pip install . --no-build-isolation`."
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        stop(
            f"torch {torch.__version__} is too old: its stable C ABI is needed from 2.11 on. `pip install 'torch>=2.11'`"
        )
    return Path(torch.__file__).parent / "include"


def tool(name: str) -> str:
    """Path of a build tool: from the environment's own scripts first, then from PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        stop(f"{name} was not found. `pip install {name}`, or {ALTERNATIVE}.")
    return str(found)


def find_nvcc() -> str | None:
    for home in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        base = os.environ.get(home)
        if base:
            path = Path(base) if home == "CUDACXX" else Path(base) / "bin" / "nvcc"
            if path.exists():
                return str(path)
    return shutil.which("nvcc") or (str(path) if (path := Path("/usr/local/cuda/bin/nvcc")).exists() else None)


class CMakeBuild(build_ext):
    """Runs CMake once and puts the libraries next to the package's Python files."""

    def build_extension(self, ext: Extension) -> None:
        if platform.system() != "Linux":
            stop(f"the compiled library is built on Linux only, this is {platform.system()}; {ALTERNATIVE}.")
        include = torch_include()
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            stop(
                "no C++ compiler was found. Debian/Ubuntu: `apt-get install g++`; Fedora: `dnf install gcc-c++`; or set CXX. "
                f"{ALTERNATIVE}."
            )
        wanted, nvcc = flag("GRIT_KERNELS_CUDA"), find_nvcc()
        if wanted and not nvcc:
            stop(
                "GRIT_KERNELS_CUDA=1, but nvcc was not found. Install the CUDA toolkit (12.8 or newer for sm_100) and put "
                "nvcc on PATH or set CUDA_HOME; GRIT_KERNELS_CUDA=0 builds the CPU library only."
            )
        arguments = [
            f"-DTORCH_INCLUDE={include}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DGRIT_SANITIZE={'ON' if flag('GRIT_KERNELS_SANITIZE') else 'OFF'}",
        ]
        with_cuda = bool(nvcc) and wanted is not False
        arguments.append(f"-DGRIT_CUDA={'ON' if with_cuda else 'OFF'}")
        if with_cuda:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob("_C*.so"):
            stale.unlink()
        cmake = tool("cmake")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments], check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
            subprocess.run([cmake, "--install", str(build), "--prefix", str(target)], check=True)
        except subprocess.CalledProcessError as error:
            hint = "GRIT_KERNELS_CUDA=0 leaves the CUDA library out. " if with_cuda else ""
            stop(f"`{' '.join(error.cmd[:2])} ..` failed, see the lines above. {hint}{ALTERNATIVE}.")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def copy_extensions_to_source(self) -> None:
        """An editable install takes every library of the build, not only the one setuptools knows of."""
        package = self.get_finalized_command("build_py").get_package_dir("grit_kernels")
        for library in Path(self.build_lib, "grit_kernels").glob("_C*.so"):
            self.copy_file(str(library), package)


class PlatformWheel(bdist_wheel):
    """The library has no Python API: one wheel per platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, tag = super().get_tag()
        return "py3", "none", tag


if flag("GRIT_KERNELS_NO_EXTENSION"):
    setup()
else:
    setup(
        ext_modules=[Extension("grit_kernels._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
