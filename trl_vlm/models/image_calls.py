"""A call of `get_image_features`, taken apart into its images: what is in each, and the same call for some of them.

Every family that is tested passes its pixels in one of three layouts, and gives one entry of features per image:

    grids   pixel_values (patches, D) of all images in a row, image_grid_thw (images, 3)              Qwen-VL
    rows    pixel_values (rows, images, C, H, W), rows padded with images of zeros, and their mask    Idefics3, SmolVLM
    images  pixel_values (images, ...), and further tensors with one entry per image or tile          all others
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Arguments with something about each image; the others are options of the whole call.
_PIXELS, _GRID, _MASK, _COUNTS = "pixel_values", "image_grid_thw", "pixel_attention_mask", "batch_num_images"
_PER_IMAGE = (_PIXELS, _GRID, _MASK, _COUNTS, "image_sizes", "image_position_ids")
# Further outputs, which features of some images would lack.
_FULL_OUTPUTS = ("output_hidden_states", "output_attentions")

# What is equal in two images is told by sums of their values, each times a random number, modulo 2^64.
_SUMS = 2
_BLOCK = 2**18

Key = tuple[object, ...]


@dataclass
class ImageCall:
    """The images of a call of `get_image_features`, in groups that a family encodes together: nearly always of one.

    Attributes:
        images: The tensors of each image; their first dimension is 1, or the image's patches.
        groups: The images of each group, by number.
        counts: Whether the model is told how many images each row has (LLaVA-OneVision), which is one group then.
        by_row: Whether the call itself gives one entry of features per row, not per image.
        options: The other arguments.
    """

    images: list[dict[str, Tensor]]
    groups: list[list[int]]
    counts: bool
    by_row: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ImageCall | None":
        """The call with these arguments, by name; None if it is of another form, or asks for more than features."""
        given = {name: value for name, value in arguments.items() if value is not None}
        tensors = {name: given.pop(name) for name in _PER_IMAGE if name in given}
        counts = tensors.pop(_COUNTS, None)
        if not all(isinstance(value, Tensor) for value in tensors.values()) or _PIXELS not in tensors:
            return None
        if any(isinstance(value, Tensor) for value in given.values()) or not given.get("return_dict", True):
            return None
        if any(given.get(name) for name in _FULL_OUTPUTS):
            return None
        images = _images(tensors)
        if not images:
            return None
        groups = [[number] for number in range(len(images))] if counts is None else _groups(counts.tolist())
        if sum(map(len, groups)) != len(images):
            return None
        return cls(images, groups, counts is not None, _MASK in tensors, given)

    def contents(self, defaults: object = None, dtype: torch.dtype | None = None) -> list[Key]:
        """What is in each group: equal for equal images under equal options, and for no others.

        Args:
            defaults: Has the values of options that are left out: the model's configuration.
            dtype: The precision in which pixels are read, if it is less than theirs.
        """
        names = list(self.images[0])
        images = [image | {_PIXELS: _rounded(image[_PIXELS], dtype)} for image in self.images]
        sums = torch.stack([_sums(image[name]) for image in images for name in names])
        told = sums.view(len(images), -1).tolist()  # the one time that the CPU waits for the device
        shapes = [tuple((name, image[name].dtype, _shape(image[name])) for name in names) for image in images]
        options = tuple(
            (name, repr(value))
            for name, value in sorted(self.options.items())
            if name != "return_dict" and value is not False and value != getattr(defaults, name, None)
        )
        return [
            (options, self.counts, *((shapes[image], tuple(told[image])) for image in group)) for group in self.groups
        ]

    def part(self, groups: Sequence[int]) -> dict[str, Any]:
        """The arguments of a call with the images of these groups alone."""
        chosen = [self.groups[number] for number in groups]
        images = [self.images[image] for group in chosen for image in group]
        tensors = {name: torch.cat([image[name] for image in images]) for name in images[0]}
        if self.counts:
            tensors[_COUNTS] = torch.tensor([len(group) for group in chosen])
        return {**self.options, **tensors}


def _images(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]] | None:
    """The tensors of each image; None if they are in no known layout."""
    pixels = tensors[_PIXELS]
    if _GRID in tensors:
        patches = tensors[_GRID].prod(-1).tolist()
        if pixels.dim() != 2 or sum(patches) != len(pixels) or len(tensors) > 2:
            return None
        return _zipped({_PIXELS: pixels.split(patches), _GRID: tensors[_GRID].split(1)})
    if _MASK in tensors:
        if pixels.dim() != 5 or len(tensors) > 2:
            return None
        # As the models do: what is all zero is padding.
        real = pixels.flatten(0, 1).flatten(1).any(1)
        return _zipped({name: value.flatten(0, 1)[real][:, None].split(1) for name, value in tensors.items()})
    if any(len(value) != len(pixels) for value in tensors.values()):
        return None
    return _zipped({name: value.split(1) for name, value in tensors.items()})


def _zipped(parts: Mapping[str, Sequence[Tensor]]) -> list[dict[str, Tensor]]:
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def _groups(counts: Sequence[int]) -> list[list[int]]:
    """The images of each row that has any."""
    ends = [sum(counts[:row]) for row in range(len(counts) + 1)]
    return [list(range(start, end)) for start, end in zip(ends, ends[1:], strict=False) if end > start]


def _rounded(pixels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Pixels in the precision of a tower, whose first product rounds them so: some callers have done it before."""
    is_less = dtype is not None and pixels.is_floating_point() and dtype.itemsize < pixels.element_size()
    return pixels.to(dtype) if is_less else pixels


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape, without the number of tiles: a batch pads it with zeros, which add nothing to the sums."""
    return tuple(tensor.shape[2:] if tensor.dim() == 5 else tensor.shape)


def _sums(tensor: Tensor) -> Tensor:
    """(2,) int64: two tensors of one shape and one precision have the same sums if they are equal, else not.

    Each is a sum of all values, as integers, times fixed random numbers: of unequal tensors one sum is equal with a
    probability below 2^-32, both are with one below 2^-64. Computed where the tensor is, without waiting for it.
    """
    words = tensor.detach().contiguous().flatten()
    if words.is_floating_point():
        words = words.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()])
    factors, of_blocks = _factors(words.device)
    sums = torch.zeros(_SUMS, dtype=torch.int64, device=words.device)
    for number, block in enumerate(words.split(_BLOCK)):
        of_block = (block * factors[:, : len(block)]).sum(1)
        sums += of_block * of_blocks[number % len(of_blocks)]
    return sums


@functools.cache
def _factors(device: torch.device) -> tuple[Tensor, list[int]]:
    """Odd random numbers, the same in each run: (2, values of a block) for values, and some for blocks."""
    generator = torch.Generator().manual_seed(20231)
    draw = functools.partial(torch.randint, -(2**62), 2**62, generator=generator)
    return draw((_SUMS, _BLOCK)).mul(2).add(1).to(device), draw((1024,)).mul(2).add(1).tolist()
