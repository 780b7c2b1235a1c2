"""The released checkpoints as data: where they are, how large they are and what is known of them."""

__all__ = ["AT_TIMM", "ON_HUB", "PUBLISHED", "Published", "list_models"]

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .config import variant_sizes

BASE_URL = "https://storage.googleapis.com/mixer_models/"
TIMM_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download/"
HUB = "hf:"  # before owner/repository
HUB_FILE = "model.safetensors"

COPY = "Google's weights under timm's names: trained with the tanh GELU, where timm computes the exact one"
WRONG_TAG = (
    f"{COPY}; the tag ft_in1k is wrong: these are the ImageNet-1k files, and Mixers fine-tuned from ImageNet-21k were never "
    "published (a Google author on timm's pull request 651, where the accuracy is from)"
)
OTHERS = "Google does not give its accuracy: it is the one that others report"
MIIL = "trained by Alibaba's MIIL on ImageNet-21K-P, with the exact GELU and values from 0 to 1"


@dataclass(frozen=True)
class Published:
    """One released checkpoint.

    `mib` is its size to 0.01 MiB as its owners list it, `top1` its accuracy on ImageNet's validation images in per cent,
    each None if unknown. `preprocessing` is the one that it was evaluated with, `copy_of` the file with the same weights in
    Google's or timm's collection. `sha256` has the first 8 digits of the file's, `release` is where timm keeps it.
    """

    name: str
    variant: str
    classes: int
    mib: float | None = None
    top1: float | None = None
    note: str = ""
    layout: str = "google"
    preprocessing: str = "resmall_crop"
    copy_of: str = ""
    sha256: str = ""
    release: str = ""

    @property
    def file(self) -> str:
        """Its path below BASE_URL or a mirror, or in its repository on the Hugging Face hub."""
        return HUB_FILE if self.name.startswith(HUB) else self.name + (".pth" if self.release else ".npz")

    @property
    def address(self) -> str:
        """Where its owners offer it; on the hub that is the repository's own affair."""
        return f"{TIMM_RELEASES}{self.release}/{self.file.split('/')[-1]}" if self.release else BASE_URL + self.file

    def is_plausible(self, size: int) -> bool:
        """Whether a file of `size` bytes can be the listed one."""
        return self.mib is None or abs(size / 2**20 - self.mib) <= 0.01


def _at_timm(name: str, release: str, variant: str, classes: int, *, copy_of: str = "", **facts: Any) -> Published:
    how = "timm_bicubic" if copy_of else "timm_bilinear"
    sha256, note = name.split("-")[-1], COPY if copy_of else MIIL
    options = {"layout": "timm", "preprocessing": how, "copy_of": copy_of, "sha256": sha256, "release": release}
    return Published(f"timm/{name}", variant, classes, note=note, **options | facts)


def _on_hub(tag: str, variant: str, classes: int, copy_of: str, note: str, top1: float | None = None) -> Published:
    how, name = "timm_bilinear" if note == MIIL else "timm_bicubic", f"mixer_{variant.lower().replace('/', '')}_224.{tag}"
    return Published(f"{HUB}timm/{name}", variant, classes, None, top1, note, "timm", how, copy_of)


_ALL = (
    Published("imagenet1k/Mixer-B_16", "B/16", 1000, 228.47, 76.44),  # the paper's figures, trained on ImageNet alone
    Published("imagenet1k/Mixer-L_16", "L/16", 1000, 794.29, 71.76),
    Published("imagenet21k/Mixer-B_16", "B/16", 21_843, 289.61),
    Published("imagenet21k/Mixer-L_16", "L/16", 21_843, 875.78),
    Published("sam/Mixer-B_16", "B/16", 1000, 228.47, 77.36, OTHERS),
    Published("sam/Mixer-B_32", "B/32", 1000, 230.04, 72.47, OTHERS),
    Published("gsam/Mixer-B_16", "B/16", 1000, 228.47),
    Published("gsam/Mixer-B_32", "B/32", 1000, 230.04),
    Published("gsam/Mixer-S_16", "S/16", 1000, 70.71),
    Published("gsam/Mixer-S_32", "S/32", 1000, 72.91),
    Published("gsam/Mixer-S_8", "S/8", 1000, 78.79),
    _at_timm("jx_mixer_b16_224-76587d61", "v0.1-vitjx", "B/16", 1000, copy_of="imagenet1k/Mixer-B_16", top1=76.616),
    _at_timm("jx_mixer_l16_224-92f9adc4", "v0.1-vitjx", "L/16", 1000, copy_of="imagenet1k/Mixer-L_16", top1=72.084),
    _at_timm("jx_mixer_b16_224_in21k-617b3de2", "v0.1-vitjx", "B/16", 21_843, copy_of="imagenet21k/Mixer-B_16"),
    _at_timm("jx_mixer_l16_224_in21k-846aa33c", "v0.1-vitjx", "L/16", 21_843, copy_of="imagenet21k/Mixer-L_16"),
    _at_timm("mixer_b16_224_miil-9229a591", "v0.1-tresnet", "B/16", 1000, top1=82.314),
    _at_timm("mixer_b16_224_miil_in21k-2a558a71", "v0.1-tresnet", "B/16", 11_221),
    _on_hub("goog_in21k_ft_in1k", "B/16", 1000, "imagenet1k/Mixer-B_16", WRONG_TAG, 76.6),
    _on_hub("goog_in21k_ft_in1k", "L/16", 1000, "imagenet1k/Mixer-L_16", WRONG_TAG, 72.1),
    _on_hub("goog_in21k", "B/16", 21_843, "imagenet21k/Mixer-B_16", COPY),
    _on_hub("goog_in21k", "L/16", 21_843, "imagenet21k/Mixer-L_16", COPY),
    _on_hub("miil_in21k_ft_in1k", "B/16", 1000, "timm/mixer_b16_224_miil-9229a591", MIIL, 82.3),
    _on_hub("miil_in21k", "B/16", 11_221, "timm/mixer_b16_224_miil_in21k-2a558a71", MIIL),
)
PUBLISHED = {file.name: file for file in _ALL if file.layout == "google"}  # in Google's bucket
AT_TIMM = {file.name: file for file in _ALL if file.release}
ON_HUB = {file.name: file for file in _ALL if file.name.startswith(HUB)}
KNOWN = PUBLISHED | AT_TIMM | ON_HUB


def published_file(name: str) -> Published | None:
    """The file that a name such as "imagenet1k/Mixer-B_16" stands for, which may have its ending."""
    return KNOWN.get(name) or next((file for file in KNOWN.values() if file.file == name != HUB_FILE), None)


def is_published(name: str) -> bool:
    """Whether it is the name of a file that can be downloaded, and not a path."""
    return name.startswith(HUB) or published_file(name) is not None


def file_named(name: str) -> Published | None:
    """The published file whose hash is in its name, and whose name in a folder this is."""
    return next((file for file in KNOWN.values() if file.sha256 and file.file.split("/")[-1] == name), None)


def with_hash(sha256: str) -> Published | None:
    """The published file of this SHA-256, so far as hashes are known."""
    return next((file for file in KNOWN.values() if file.sha256 and sha256.startswith(file.sha256)), None)


def of_sizes(sizes: Mapping[str, int]) -> list[Published]:
    """The published files whose widths, depth, patch and classes are these sizes of arrays, at any image size."""

    def fits(file: Published) -> bool:
        patch, wanted = variant_sizes(file.variant)
        wanted = wanted | {"patch_height": patch, "patch_width": patch, "num_classes": file.classes}
        return all(sizes[name] == size for name, size in wanted.items())

    return list(filter(fits, KNOWN.values()))


def list_models(filter: str = "*") -> list[str]:
    """The names of the published files, for `load`, `read` and the commands, which take any "hf:owner/repository" too.

    `filter` is a pattern of `*`, `?` and `[...]`, such as "*B_16*"; upper and lower case are the same.
    """
    return [name for name in KNOWN if fnmatchcase(name.lower(), filter.lower())]


def nearest(name: str) -> list[str]:
    """The names of the published files, those most like `name` first: "B/16" and "mixer_b16" find "Mixer-B_16"."""

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    def likeness(known: str) -> tuple[bool, float]:
        return plain(name) in plain(known), difflib.SequenceMatcher(None, plain(name), plain(known)).ratio()

    return sorted(list_models(), key=likeness, reverse=True)
