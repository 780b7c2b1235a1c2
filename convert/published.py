"""The released checkpoints as data: where they lie, how large they are and what is known of them."""

__all__ = ["ON_HUB", "PUBLISHED", "Published", "list_models"]

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

BASE_URL = "https://storage.googleapis.com/mixer_models/"
HUB = "hf:"  # before owner/repository
HUB_FILE = "model.safetensors"

# name, variant, classes, MiB as the owners list it, top-1
_BUCKET: tuple[tuple[str, str, int, float, float | None], ...] = (
    ("imagenet1k/Mixer-B_16", "B/16", 1000, 228.47, 76.44),  # the paper's figures, trained on ImageNet alone
    ("imagenet1k/Mixer-L_16", "L/16", 1000, 794.29, 71.76),
    ("imagenet21k/Mixer-B_16", "B/16", 21_843, 289.61, None),
    ("imagenet21k/Mixer-L_16", "L/16", 21_843, 875.78, None),
    ("sam/Mixer-B_16", "B/16", 1000, 228.47, None),
    ("sam/Mixer-B_32", "B/32", 1000, 230.04, None),
    ("gsam/Mixer-B_16", "B/16", 1000, 228.47, None),
    ("gsam/Mixer-B_32", "B/32", 1000, 230.04, None),
    ("gsam/Mixer-S_16", "S/16", 1000, 70.71, None),
    ("gsam/Mixer-S_32", "S/32", 1000, 72.91, None),
    ("gsam/Mixer-S_8", "S/8", 1000, 78.79, None),
)
_COPY = "Google's weights under timm's names: trained with the tanh GELU, where timm computes the exact one"
_WRONG_TAG = (
    f"{_COPY}; the tag ft_in1k is wrong: these are the ImageNet-1k files, and Mixers fine-tuned from ImageNet-21k were never "
    "published (a Google author on timm's pull request 651, where the accuracy is from)"
)
# name, variant, classes, top-1, note
_HUB: tuple[tuple[str, str, int, float | None, str], ...] = (
    ("hf:timm/mixer_b16_224.goog_in21k_ft_in1k", "B/16", 1000, 76.6, _WRONG_TAG),
    ("hf:timm/mixer_l16_224.goog_in21k_ft_in1k", "L/16", 1000, 72.1, _WRONG_TAG),
    ("hf:timm/mixer_b16_224.goog_in21k", "B/16", 21_843, None, _COPY),
    ("hf:timm/mixer_l16_224.goog_in21k", "L/16", 21_843, None, _COPY),
)


@dataclass(frozen=True)
class Published:
    """One released checkpoint.

    `file` is its path below BASE_URL, or in its repository on the Hugging Face hub. `mib` is its size to 0.01 MiB as its
    owners list it, `top1` its accuracy on ImageNet's validation images in per cent, each None where that is not known.
    """

    name: str
    file: str
    variant: str
    classes: int
    mib: float | None = None
    top1: float | None = None
    note: str = ""

    def is_plausible(self, size: int) -> bool:
        """Whether a file of `size` bytes can be the listed one."""
        return self.mib is None or abs(size / 2**20 - self.mib) <= 0.01


PUBLISHED = {
    name: Published(name, f"{name}.npz", variant, classes, mib=mib, top1=top1) for name, variant, classes, mib, top1 in _BUCKET
}
ON_HUB = {
    name: Published(name, HUB_FILE, variant, classes, top1=top1, note=note) for name, variant, classes, top1, note in _HUB
}


def is_published(name: str) -> bool:
    """Whether a name is that of a file that can be fetched, and not a path."""
    return name.startswith(HUB) or name.removesuffix(".npz") in PUBLISHED


def list_models(filter: str = "*") -> list[str]:
    """The names of the published files that `load`, `read` and the commands take, those alone that match: "*B_16*".

    `filter` is a pattern of `*`, `?` and `[...]`, in either case of letters. Any "hf:owner/repository" is taken besides.
    """
    return [name for name in (PUBLISHED | ON_HUB) if fnmatchcase(name.lower(), filter.lower())]


def nearest(name: str) -> list[str]:
    """The names of the published files, those most like `name` first: "B/16" and "mixer_b16" mean what ends in "Mixer-B_16"."""

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    def likeness(known: str) -> tuple[bool, float]:
        return plain(name) in plain(known), difflib.SequenceMatcher(None, plain(name), plain(known)).ratio()

    return sorted(list_models(), key=likeness, reverse=True)
