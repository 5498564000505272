"""Compiles the native kernels when the package is installed; everything else about it stands in pyproject.toml.

Without a compiler, or with one that fails, the package is installed all the same and PyTorch does the work.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILDER = runpy.run_path(str(ROOT / "src/strop/kernels/build.py"), run_name="strop_kernels_build")
FILES = (BUILDER["LIBRARY"], BUILDER["RECEIPT"])


class BuildKernels(build_ext):
    """Calls the package's own builder: the library is loaded with ctypes and belongs to no version of Python."""

    def run(self) -> None:
        """Compile into the package's folder: that of the build, or the sources' own (an editable installation)."""
        folder = self._folder()
        for name in FILES:  # what an earlier build left there may be of other sources
            (folder / name).unlink(missing_ok=True)
        try:
            receipt = BUILDER["build"](folder)
        except (BUILDER["BuildError"], OSError) as error:
            self.warn(f"the native kernels were not compiled, and PyTorch does their work: {error}")
            return
        self.announce(f"native kernels for {', '.join(receipt['instruction_sets'])}", level=2)

    def get_outputs(self) -> list[str]:
        """The files that were made, which may be none."""
        return [str(path) for name in FILES if (path := self._folder() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is made in one place and meant for another."""
        return {}

    def _folder(self) -> Path:
        return ROOT / "src/strop/kernels" if self.inplace else Path(self.build_lib) / "strop/kernels"


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag: no version of Python's C interface."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("strop.kernels.strop_kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
