"""What pyproject.toml cannot say: the parts in C. Each may be missing: everything works without them, slower."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("data_pipelines/native")
#: Sums of floating-point numbers must not depend on the compiler: the portable path gives the bytes of the fast one.
OPTIONS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]


def extension(name: str, *sources: str, **options: list[str]) -> Extension:
    return Extension(
        f"data_pipelines.native.{name}",
        [str(NATIVE / source) for source in sources],
        depends=[str(header) for header in sorted(NATIVE.glob("*.h"))],
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


setup(
    ext_modules=[
        extension(
            "_crops",
            "module.c",
            "stream.c",
            "crop.c",
            "weights.c",
            "resample.c",
            "resample_avx2.c",
            "colour.c",
            "colour_avx2.c",
            "blur.c",
        ),
        extension("_jpeg_region", "jpeg_region.c", libraries=["jpeg"]),  # needs libjpeg-turbo's header (libjpeg-dev)
    ],
    cmdclass={"build_ext": BuildOrTell},
)
