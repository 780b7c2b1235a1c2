"""The released checkpoints as data: where they are, how large they are and what is known of them."""

__all__ = ["ON_HUB", "PUBLISHED", "Published", "list_models"]

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

BASE_URL = "https://storage.googleapis.com/mixer_models/"
HUB = "hf:"  # before owner/repository
HUB_FILE = "model.safetensors"

COPY = "Google's weights under timm's names: trained with the tanh GELU, where timm computes the exact one"
WRONG_TAG = (
    f"{COPY}; the tag ft_in1k is wrong: these are the ImageNet-1k files, and Mixers fine-tuned from ImageNet-21k were never "
    "published (a Google author on timm's pull request 651, where the accuracy is from)"
)


@dataclass(frozen=True)
class Published:
    """One released checkpoint.

    `mib` is its size to 0.01 MiB as its owners list it, `top1` its accuracy on ImageNet's validation images in per cent,
    each None if unknown.
    """

    name: str
    variant: str
    classes: int
    mib: float | None = None
    top1: float | None = None
    note: str = ""

    @property
    def file(self) -> str:
        """Its path below BASE_URL, or in its repository on the Hugging Face hub."""
        return HUB_FILE if self.name.startswith(HUB) else f"{self.name}.npz"

    def is_plausible(self, size: int) -> bool:
        """Whether a file of `size` bytes can be the listed one."""
        return self.mib is None or abs(size / 2**20 - self.mib) <= 0.01


_ALL = (
    Published("imagenet1k/Mixer-B_16", "B/16", 1000, 228.47, 76.44),  # the paper's figures, trained on ImageNet alone
    Published("imagenet1k/Mixer-L_16", "L/16", 1000, 794.29, 71.76),
    Published("imagenet21k/Mixer-B_16", "B/16", 21_843, 289.61),
    Published("imagenet21k/Mixer-L_16", "L/16", 21_843, 875.78),
    Published("sam/Mixer-B_16", "B/16", 1000, 228.47),
    Published("sam/Mixer-B_32", "B/32", 1000, 230.04),
    Published("gsam/Mixer-B_16", "B/16", 1000, 228.47),
    Published("gsam/Mixer-B_32", "B/32", 1000, 230.04),
    Published("gsam/Mixer-S_16", "S/16", 1000, 70.71),
    Published("gsam/Mixer-S_32", "S/32", 1000, 72.91),
    Published("gsam/Mixer-S_8", "S/8", 1000, 78.79),
    Published("hf:timm/mixer_b16_224.goog_in21k_ft_in1k", "B/16", 1000, top1=76.6, note=WRONG_TAG),
    Published("hf:timm/mixer_l16_224.goog_in21k_ft_in1k", "L/16", 1000, top1=72.1, note=WRONG_TAG),
    Published("hf:timm/mixer_b16_224.goog_in21k", "B/16", 21_843, note=COPY),
    Published("hf:timm/mixer_l16_224.goog_in21k", "L/16", 21_843, note=COPY),
)
PUBLISHED = {published.name: published for published in _ALL if not published.name.startswith(HUB)}  # in Google's bucket
ON_HUB = {published.name: published for published in _ALL if published.name.startswith(HUB)}


def is_published(name: str) -> bool:
    """Whether it is the name of a file that can be downloaded, and not a path."""
    return name.startswith(HUB) or name.removesuffix(".npz") in PUBLISHED


def list_models(filter: str = "*") -> list[str]:
    """The names of the published files, for `load`, `read` and the commands, which take any "hf:owner/repository" too.

    `filter` is a pattern of `*`, `?` and `[...]`, such as "*B_16*"; upper and lower case are the same.
    """
    return [name for name in (PUBLISHED | ON_HUB) if fnmatchcase(name.lower(), filter.lower())]


def nearest(name: str) -> list[str]:
    """The names of the published files, those most like `name` first: "B/16" and "mixer_b16" find "Mixer-B_16"."""

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    def likeness(known: str) -> tuple[bool, float]:
        return plain(name) in plain(known), difflib.SequenceMatcher(None, plain(name), plain(known)).ratio()

    return sorted(list_models(), key=likeness, reverse=True)
