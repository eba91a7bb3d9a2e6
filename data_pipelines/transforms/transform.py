"""One sample shown in one row or several: parameters drawn, the part that they need decoded, crops made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange

from data_pipelines.images.regions import Picture, Region, needed
from data_pipelines.transforms.backends.base import Backend, CropJob
from data_pipelines.transforms.backends.colours import write_colours
from data_pipelines.transforms.config import Views
from data_pipelines.transforms.params import CropParams, draw, draw_shaped

#: A crop of its own shape, and its rows and columns of patches.
Shaped = tuple[CropParams, tuple[int, int]]


class Recipe:
    """How every sample becomes crops.

    Args:
        views: The crops.
        backend: Makes them.
        colour_on_device: The backend only cuts, resizes and flips; colours are written down for the device.
        partial_decode: Leave out what no crop touches.
        dct_scaling: Decode large images smaller where their crops have px to spare.
    """

    def __init__(
        self,
        views: Views,
        backend: Backend,
        *,
        colour_on_device: bool = False,
        partial_decode: bool = True,
        dct_scaling: bool = True,
    ) -> None:
        self.views, self.backend, self.colour_on_device = views, backend, colour_on_device
        self.partial_decode, self.dct_scaling = partial_decode, dct_scaling
        local, target = views.local_crops, views.target_crop
        self.num_global = len(views.global_crops)
        sizes = [views.global_size] * self.num_global + ([local.size] * local.count if local else [])
        self._targets = [(view, size) for view, size in enumerate(sizes)]
        if target is not None:
            self._targets.append((0, target.size))
        if views.teacher_crops is not None:
            self._targets += [(view, views.teacher_crops.size) for view in range(self.num_global)]

    def region(self, size: tuple[int, int], drawn: Sequence[tuple[CropParams, ...]]) -> Region:
        """What rows with these parameters need of an image of (height, width) `size`."""
        crops = [(params[view].box, target) for params in drawn for view, target in self._targets]
        return needed(size, crops, self.partial_decode, self.dct_scaling)

    def jobs(
        self, picture: Picture, params: tuple[CropParams, ...], arrays: dict[str, np.ndarray], place: int
    ) -> list[CropJob]:
        """The crops of one row, which lies at `place` of the buffer."""
        views, num_global = self.views, self.num_global
        if self.colour_on_device:
            for view, crop in enumerate(params):
                name, number = ("global_colours", view) if view < num_global else ("local_colours", view - num_global)
                write_colours(crop, arrays[name][place, number])
                if view < num_global and "teacher_colours" in arrays:
                    write_colours(self._for_teacher(crop), arrays["teacher_colours"][place, number])
        if self.colour_on_device or picture.is_part:
            params = tuple(self._within(picture, crop) for crop in params)
        jobs = [
            CropJob(params[view], crop.interpolation, out)
            for view, (crop, out) in enumerate(zip(views.global_crops, arrays["global_crops"][place], strict=True))
        ]
        if views.local_crops is not None:
            interpolation = views.local_crops.interpolation
            jobs += [
                CropJob(crop, interpolation, out)
                for crop, out in zip(params[num_global:], arrays["local_crops"][place], strict=True)
            ]
        if views.target_crop is not None:
            jobs.append(CropJob(params[0], views.target_crop.interpolation, arrays["target_crops"][place]))
        if views.teacher_crops is not None:
            jobs += [
                CropJob(self._for_teacher(crop), views.teacher_crops.interpolation, out)
                for crop, out in zip(params[:num_global], arrays["teacher_crops"][place], strict=True)
            ]
        return jobs

    def _for_teacher(self, params: CropParams) -> CropParams:
        """A global crop's parameters at the teacher's size, where a blur has as many px more."""
        teacher = self.views.teacher_crops
        assert teacher is not None
        if not teacher.colours:
            return CropParams(params.box, params.flip)
        if params.blur_radius is None:
            return params
        return params._replace(blur_radius=params.blur_radius * teacher.size[0] / self.views.global_size[0])

    def shaped_region(self, size: tuple[int, int], drawn: Sequence[tuple[Shaped, ...]]) -> Region:
        """`region` of crops of their own shape."""
        crops = [(params.box, self._side(grid)) for row in drawn for params, grid in row]
        return needed(size, crops, self.partial_decode, self.dct_scaling)

    def make_shaped(
        self, picture: Picture, drawn: tuple[Shaped, ...], arrays: dict[str, np.ndarray], place: int
    ) -> None:
        """The crops of one row as patches, into the beginning of their places; and their rows and columns."""
        local, jobs = self.views.local_crops, []
        for number, (crop, grid) in enumerate(drawn):
            params = crop._replace(box=picture.within(crop.box)) if picture.is_part else crop
            view = self.views.global_crops[number] if number < self.num_global else local
            assert view is not None
            out = np.empty((picture.pixels.shape[2], *self._side(grid)), picture.pixels.dtype)
            jobs.append(CropJob(params, view.interpolation, out))
        self.backend(picture.pixels, jobs)
        for number, ((_, grid), job) in enumerate(zip(drawn, jobs, strict=True)):
            kind, slot = ("global", number) if number < self.num_global else ("local", number - self.num_global)
            patches = rearrange(job.out, "c (h p) (w q) -> (h w) (p q c)", h=grid[0], w=grid[1])
            arrays[f"{kind}_patches"][place, slot, : len(patches)] = patches
            arrays[f"{kind}_grids"][place, slot] = grid

    def _side(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in px of so many rows and columns of patches."""
        patch = self.views.global_crops[0].patch
        assert patch is not None
        return grid[0] * patch, grid[1] * patch

    def _within(self, picture: Picture, params: CropParams) -> CropParams:
        box = picture.within(params.box)
        return CropParams(box, params.flip) if self.colour_on_device else params._replace(box=box)


class SampleCrops:
    """The rows that show one sample; told its size by the decoder (`Choose`), then its pixels.

    Args:
        recipe: What to make.
        identities: What the draws of each repeat of the sample depend on, see `draw`: of all of them, so that what is
            decoded does not depend on which of its rows are made here.
    """

    def __init__(self, recipe: Recipe, identities: Sequence[tuple[int, ...]]) -> None:
        self._recipe, self._identities = recipe, identities
        #: Of each repeat, and the size (height, width) of the image, as soon as that is known.
        self.drawn: list[tuple[CropParams, ...]] = []
        self._shaped: list[tuple[Shaped, ...]] = []  # the same, where they keep their own shape
        self.size: tuple[int, int] | None = None

    def __call__(self, size: tuple[int, int]) -> Region:
        """Draw for an image of (height, width) `size`, and say what of it is needed."""
        self.size = size
        if self._recipe.views.native:
            self._shaped = [
                tuple(zip(*draw_shaped(self._recipe.views, identity, size), strict=True))
                for identity in self._identities
            ]
            return self._recipe.shaped_region(size, self._shaped)
        self.drawn = [draw(self._recipe.views, identity, size) for identity in self._identities]
        return self._recipe.region(size, self.drawn)

    def make(self, picture: Picture, arrays: dict[str, np.ndarray], places: dict[int, int]) -> None:
        """Write the rows' crops into the buffer: `places` has the place of each repeat that is made here."""
        if self._recipe.views.native:
            for repeat, place in places.items():
                self._recipe.make_shaped(picture, self._shaped[repeat], arrays, place)
            return
        jobs = [
            job
            for repeat, place in places.items()
            for job in self._recipe.jobs(picture, self.drawn[repeat], arrays, place)
        ]
        self._recipe.backend(picture.pixels, jobs)
