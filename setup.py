"""What pyproject.toml cannot say: that `import selfsight` is the folder launch/facade, and the parts in C.

Each of these may be missing: everything works without them, slower.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

#: Sums of floating-point numbers must not depend on the compiler: the portable path gives the bytes of the fast one.
OPTIONS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]


def extension(name: str, **options: list[str]) -> Extension:
    """The module of that full name, made of all C files in its folder."""
    folder = Path(*name.split(".")[:-1])
    return Extension(
        name,
        [str(source) for source in sorted(folder.glob("*.c"))],
        depends=[str(header) for header in sorted(folder.glob("*.h"))],
        extra_compile_args=OPTIONS,
        optional=True,
        **options,
    )


class BuildOrTell(build_ext):
    """Where a part cannot be built, installing goes on, and says in one line what that costs."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # what a missing or broken compiler raises differs between platforms
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"notice: {ext.name} is not built ({reason}); slower code takes its place", file=sys.stderr)


PACKAGES = ("data_pipelines", "eval", "launch", "pretrain", "slurm")

setup(
    packages=[*find_packages(include=[f"{name}*" for name in PACKAGES], exclude=["launch.facade*"]), "selfsight"],
    package_dir={"selfsight": "launch/facade"},
    ext_modules=[
        extension("data_pipelines.native._crops"),
        extension("data_pipelines.images.native._jpeg_region", libraries=["jpeg"]),  # needs libjpeg-dev's header
    ],
    cmdclass={"build_ext": BuildOrTell},
)
