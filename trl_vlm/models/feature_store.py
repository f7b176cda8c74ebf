"""Features of images, kept up to a number of bytes."""

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from trl_vlm.models.image_calls import Key

logger = logging.getLogger(__name__)

SplitTowers = Literal["encode", "agree", "gathered"]


class Output(Protocol):
    """What a family returns; Qwen3-VL's also has `deepstack_features`, for each of some layers such a sequence."""

    pooler_output: Tensor | Sequence[Tensor]


class Tower(Protocol):
    """What encodes images.

    Attributes:
        number: Of its weights.
    """

    number: int

    def is_current(self) -> bool:
        """Whether the weights are those that have the number."""
        ...

    def equals(self, other: Any) -> bool:
        """Whether both give the same features, to the last digit."""
        ...


class Features(NamedTuple):
    """The features of a group of images.

    Args:
        kind: Of the output that holds them.
        stacked: Whether the family gives one tensor for all images.
        layers: A tensor per image, of the features and then of each of the deeper layers' features.
        device: Where the tower has computed them.
    """

    kind: Callable[..., Output]
    stacked: bool
    layers: list[list[Tensor]]
    device: torch.device

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def on(self, device: torch.device) -> "Features":
        """A copy there that shares no memory with the features of other images."""
        layers = [[tensor.detach().to(device, copy=True).contiguous() for tensor in layer] for layer in self.layers]
        return self._replace(layers=layers)


class FeatureStore:
    """Features of images up to a limit, the last used ones.

    Args:
        limit: In bytes.
        on_cpu: Whether they are kept in the memory of the CPU, and not of the device that encodes.

    Attributes:
        in_split_towers: What is done where each process holds a part of a tower. "encode": each time. "agree": all
            processes read images together, and the tower runs on all of them if one has none of the features that it
            needs. "gathered": as elsewhere, each process has the whole tower at the moment.
    """

    in_split_towers: SplitTowers = "encode"

    def __init__(self, limit: float, on_cpu: bool = False):
        self.limit, self.on_cpu = limit, on_cpu
        self.size = 0
        self._kept: OrderedDict[Key, Features] = OrderedDict()
        self._towers: list[weakref.ref[Tower]] = []
        self._numbers = itertools.count()
        self._has_told = False

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureStore":
        return FeatureStore(self.limit, self.on_cpu)

    def find(self, key: Key) -> Features | None:
        """The features under a key, on the device that encoded them."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        if not self.on_cpu:
            return found
        return found._replace(layers=[[tensor.to(found.device) for tensor in layer] for layer in found.layers])

    def keep(self, key: Key, features: Features) -> None:
        """Keeps a copy, instead of those that were not used for longest."""
        if key in self._kept:
            return
        size = features.size
        if self.size + size > self.limit:
            self._tell()
        if size > self.limit:
            return
        while self.size + size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].size
        self._kept[key] = features.on(torch.device("cpu") if self.on_cpu else features.device)
        self.size += size

    def clear(self) -> None:
        """Forgets all features."""
        self._kept.clear()
        self.size = 0

    @contextmanager
    def used_in_split_towers(self, how: SplitTowers) -> Iterator[None]:
        """A context for what all processes do together, or for weights that are gathered: see `in_split_towers`."""
        before, self.in_split_towers = self.in_split_towers, how
        try:
            yield
        finally:
            self.in_split_towers = before

    def _tell(self) -> None:
        if not self._has_told:
            logger.warning(
                "More features of images are read again than the %.2f GiB of `image_feature_cache` hold: some are "
                "encoded again. A larger number, perhaps with `image_features_on_cpu=True`, spares that.",
                self.limit / 2**30,
            )
        self._has_told = True

    def number_of(self, tower: Tower) -> int:
        """A number that towers with the same weights have in common."""
        others = [other for reference in self._towers if (other := reference()) is not None and other is not tower]
        self._towers = [weakref.ref(each) for each in (*others, tower)]
        same = (other.number for other in others if other.is_current() and other.equals(tower))
        return next(same, None) or self.new_number()

    def new_number(self) -> int:
        """One that no tower has."""
        return next(self._numbers) + 1
