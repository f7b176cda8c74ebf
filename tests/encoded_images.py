"""Counts what goes through a vision tower."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

TOWERS = ("vision_tower", "vision_model", "visual")


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision tower of a model, under whatever wrappers."""
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] in TOWERS)


class Passes:
    """What went through some towers: the pixels of each pass, and their number."""

    def __init__(self) -> None:
        self.pixels: list[Tensor] = []

    def __len__(self) -> int:
        """How many pixels, in all passes."""
        return sum(pixels.numel() for pixels in self.pixels)

    def rows(self) -> list[bytes]:
        """Each entry of the first dimension: an image, a tile of one, or a patch."""
        return [row.float().contiguous().numpy().tobytes() for pixels in self.pixels for row in pixels]


@contextmanager
def watched(*models: nn.Module) -> Iterator[Passes]:
    """Within this context all that the vision towers of the models read is written down."""
    passes = Passes()

    def see(tower: nn.Module, args: tuple, kwargs: dict) -> None:
        passes.pixels.append((args[0] if args else kwargs["pixel_values"]).detach().clone())

    hooks = [vision_tower(model).register_forward_pre_hook(see, with_kwargs=True) for model in models]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
