"""MixerConfig: the sizes and the numerics of a Mixer."""

__all__ = ["VARIANTS", "Gelu", "MixerConfig", "ModuleCost", "Size"]

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_args

Gelu = Literal["tanh", "exact"]
Size = tuple[int, int]

VARIANTS: dict[str, dict[str, int]] = {  # paper, table 1
    "S": {"num_blocks": 8, "hidden_dim": 512, "tokens_mlp_dim": 256, "channels_mlp_dim": 2048},
    "B": {"num_blocks": 12, "hidden_dim": 768, "tokens_mlp_dim": 384, "channels_mlp_dim": 3072},
    "L": {"num_blocks": 24, "hidden_dim": 1024, "tokens_mlp_dim": 512, "channels_mlp_dim": 4096},
    "H": {"num_blocks": 32, "hidden_dim": 1280, "tokens_mlp_dim": 640, "channels_mlp_dim": 5120},
}


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """What decides the function that a Mixer computes of its weights.

    `patch_size` and `image_size` are in pixels, height first; the other sizes are numbers of units. `num_classes=0` means no
    head: the model returns features. `gelu` and `layer_norm_epsilon` default to those that Google's weights were trained
    with. What only changes the rounding, such as the precision of matmuls, is not here.
    """

    patch_size: Size
    image_size: Size
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int = 1000
    in_channels: int = 3
    gelu: Gelu = "tanh"
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        faults = []
        for name in ("patch_size", "image_size"):
            object.__setattr__(self, name, as_size(getattr(self, name), name))
        sizes = ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "in_channels")
        for name, least in [(name, 1) for name in sizes] + [("num_classes", 0)]:
            value = getattr(self, name)
            count = as_int(value)
            if count is None or count < least:
                faults.append(f"{name} must be a whole number of at least {least}, not {value!r}")
            else:
                object.__setattr__(self, name, count)
        if any(pixels % patch for pixels, patch in zip(self.image_size, self.patch_size)):
            faults.append(f"image_size {_x(self.image_size)} is not a whole number of {_x(self.patch_size)} patches")
        if self.gelu not in get_args(Gelu):
            faults.append(f"gelu must be 'tanh' or 'exact', not {self.gelu!r}")
        if not (isinstance(self.layer_norm_epsilon, int | float) and 0 < self.layer_norm_epsilon < math.inf):
            faults.append(f"layer_norm_epsilon must be a positive number, not {self.layer_norm_epsilon!r}")
        if faults:
            raise ValueError("MixerConfig: " + "; ".join(faults))

    @classmethod
    def named(
        cls,
        name: str,
        *,
        num_classes: int = 1000,
        image_size: int | Size = 224,
        in_channels: int = 3,
        gelu: Gelu = "tanh",
        layer_norm_epsilon: float = 1e-6,
    ) -> Self:
        """The config of a variant: the letter (S, B, L, H) gives the widths, the number the patch: "B/16", "S/4"."""
        patch, sizes = variant_sizes(name)
        return cls(
            **sizes,
            patch_size=(patch, patch),
            image_size=as_size(image_size, "image_size"),
            num_classes=num_classes,
            in_channels=in_channels,
            gelu=gelu,
            layer_norm_epsilon=layer_norm_epsilon,
        )

    def replace(self, **changes: object) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def grid(self) -> Size:
        """Patches per column and row of an image."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sizes(self) -> dict[str, int]:
        """Every size of an array by its name in `layouts.MODULES`."""
        names = ("num_blocks", "num_classes", "in_channels", "hidden_dim", "num_tokens", "tokens_mlp_dim", "channels_mlp_dim")
        patch = {"patch_height": self.patch_size[0], "patch_width": self.patch_size[1]}
        return {name: getattr(self, name) for name in names} | patch

    @property
    def variant(self) -> str | None:
        """The name of these widths and this patch, such as "B/16", or None."""
        letter = variant_letter(self.sizes)
        square = self.patch_size[0] == self.patch_size[1]
        named = letter is not None and VARIANTS[letter]["num_blocks"] == self.num_blocks and square
        return f"{letter}/{self.patch_size[0]}" if named else None

    @property
    def num_parameters(self) -> int:
        return sum(module.parameters * module.count for module in self.modules())

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the matmuls for one image, two per multiply-add."""
        return sum(module.flops * module.count for module in self.modules())

    def modules(self) -> list["ModuleCost"]:
        """Parameters and cost of each module, in the order of the forward pass."""
        s, c, l = self.num_tokens, self.hidden_dim, self.num_blocks
        ds, dc = self.tokens_mlp_dim, self.channels_mlp_dim
        fan_in = self.patch_size[0] * self.patch_size[1] * self.in_channels
        rows = [
            ModuleCost("stem", 1, _dense(fan_in, c), 2 * s * fan_in * c),
            ModuleCost("blocks/token_norm", l, 2 * c, 0),
            ModuleCost("blocks/token_mixing", l, _dense(s, ds) + _dense(ds, s), 2 * c * 2 * s * ds),
            ModuleCost("blocks/channel_norm", l, 2 * c, 0),
            ModuleCost("blocks/channel_mixing", l, _dense(c, dc) + _dense(dc, c), 2 * s * 2 * c * dc),
            ModuleCost("pre_head_norm", 1, 2 * c, 0),
        ]
        if self.num_classes:
            rows.append(ModuleCost("head", 1, _dense(c, self.num_classes), 2 * c * self.num_classes))
        return rows


@dataclass(frozen=True)
class ModuleCost:
    """One kind of module: how many a model has, and the parameters and FLOPs an image of each."""

    name: str
    count: int
    parameters: int
    flops: int


def variant_sizes(name: str) -> tuple[int, dict[str, int]]:
    """The patch size and the other sizes of a variant such as "B/16"."""
    letter, _, patch = name.partition("/")
    if letter not in VARIANTS or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(f"no variant {name!r}: one of {', '.join(VARIANTS)}, a slash and the patch size, as in 'B/16'")
    return int(patch), VARIANTS[letter]


def variant_letter(sizes: Mapping[str, object]) -> str | None:
    """The letter whose three widths these are, whatever the depth, or None."""
    widths = ("hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    return next((k for k, v in VARIANTS.items() if all(v[w] == sizes[w] for w in widths)), None)


def usual_depth(sizes: Mapping[str, object]) -> int | None:
    """The number of blocks of the published Mixers of these widths, or None."""
    letter = variant_letter(sizes)
    return VARIANTS[letter]["num_blocks"] if letter else None


def as_size(value: int | Size, name: str) -> Size:
    """A (height, width) pair; one number means a square."""
    side = as_int(value)
    sides = (side, side) if side is not None or not isinstance(value, Iterable) else tuple(map(as_int, value))
    match sides:
        case (int(height), int(width)) if height > 0 and width > 0:
            return height, width
    raise ValueError(f"{name} must be a positive whole number or a (height, width) pair of them, not {value!r}")


def as_int(value: object) -> int | None:
    """A whole number of any library, such as NumPy, as Python's; None for anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _dense(fan_in: int, units: int) -> int:
    return fan_in * units + units


def _x(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
