"""The extensions in C, each optional: what cannot be built is said in one line, and the package does without it."""

from __future__ import annotations

from distutils.errors import CCompilerError, ExecError, PlatformError

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

JPEG_REGION = Extension(
    "data_pipelines._jpeg_region",
    ["data_pipelines/native/jpeg_region.c"],
    libraries=["jpeg"],
    extra_compile_args=["-O2"],
)
#: What is missing without an extension, and what it needs.
WITHOUT = {
    JPEG_REGION.name: "JPEGs are decoded whole; it needs a C compiler and libjpeg-turbo's header (libjpeg-dev)",
}


class BuildWhatCan(build_ext):
    """Leaves out an extension that does not compile."""

    def build_extension(self, extension: Extension) -> None:
        """Build one extension, or say why it is left out."""
        try:
            super().build_extension(extension)
        except (CCompilerError, ExecError, PlatformError) as error:
            extension.optional = True
            self.warn(f"{extension.name} is not built: {WITHOUT[extension.name]} ({error})")


setup(ext_modules=[JPEG_REGION], cmdclass={"build_ext": BuildWhatCan})
