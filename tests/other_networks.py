"""Other networks by their names of arrays, with small shapes: as timm 1.0.31, Google and mlp-mixer-pytorch spell them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from written_by_jax import safetensors, under

HEAD = {"head.weight": (3, 4), "head.bias": (3,)}
STEM = {"stem.proj.weight": (4, 3, 2, 2), "stem.proj.bias": (4,)}
MLP = {"fc1.weight": (8, 4), "fc1.bias": (8,), "fc2.weight": (4, 8), "fc2.bias": (4,)}
NORM = {"weight": (4,), "bias": (4,)}
ALPHA = {"alpha": (1, 1, 4), "beta": (1, 1, 4)}
STATISTICS = {"running_mean": (4,), "running_var": (4,)}


NETWORKS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "ResMLP": (
        "a ResMLP",
        STEM | HEAD | under("norm.", ALPHA) | under("blocks.0.norm1.", ALPHA) | under("blocks.0.norm2.", ALPHA)
        | {"blocks.0.ls1": (4,), "blocks.0.ls2": (4,)} | under("blocks.0.mlp_channels.", MLP)
        | {"blocks.0.linear_tokens.weight": (9, 9), "blocks.0.linear_tokens.bias": (9,)},
    ),
    "gMLP": (
        "a gMLP",
        STEM | HEAD | under("norm.", NORM) | under("blocks.0.norm.", NORM)
        | under("blocks.0.mlp_channels.", MLP | {"fc2.weight": (4, 4)}) | under("blocks.0.mlp_channels.gate.norm.", NORM)
        | {"blocks.0.mlp_channels.gate.proj.weight": (9, 9), "blocks.0.mlp_channels.gate.proj.bias": (9,)},
    ),
    "gMixer": (
        "a gMixer",
        STEM | HEAD | under("norm.", NORM) | under("blocks.0.norm1.", NORM) | under("blocks.0.norm2.", NORM)
        | {"blocks.0.mlp_tokens.fc1.weight": (6, 9), "blocks.0.mlp_tokens.fc1.bias": (6,)}
        | {"blocks.0.mlp_tokens.fc2.weight": (9, 3), "blocks.0.mlp_tokens.fc2.bias": (9,)}
        | under("blocks.0.mlp_channels.", MLP | {"fc2.weight": (4, 4)}),
    ),
    "ViT": (
        "a Vision Transformer",
        {"cls_token": (1, 1, 4), "pos_embed": (1, 10, 4)} | under("patch_embed.proj.", {"weight": (4, 3, 2, 2), "bias": (4,)})
        | HEAD | under("norm.", NORM) | under("blocks.0.norm1.", NORM) | under("blocks.0.norm2.", NORM)
        | under("blocks.0.mlp.", MLP) | {"blocks.0.attn.qkv.weight": (12, 4), "blocks.0.attn.proj.weight": (4, 4)},
    ),
    "ResNet": (
        "a ResNet",
        {"conv1.weight": (4, 3, 7, 7), "fc.weight": (3, 4), "fc.bias": (3,)} | under("bn1.", NORM | STATISTICS)
        | {"layer1.0.conv1.weight": (4, 4, 3, 3)} | under("layer1.0.bn1.", NORM | STATISTICS),
    ),
    "ConvMixer": (
        "a ConvMixer",
        HEAD | {"stem.0.weight": (4, 3, 7, 7), "stem.0.bias": (4,)} | under("stem.2.", NORM | STATISTICS)
        | {"blocks.0.0.fn.0.weight": (4, 1, 7, 7), "blocks.0.0.fn.0.bias": (4,)}
        | under("blocks.0.0.fn.2.", NORM | STATISTICS)
        | {"blocks.0.1.weight": (4, 4, 1, 1), "blocks.0.1.bias": (4,)} | under("blocks.0.3.", NORM | STATISTICS),
    ),
    "Google's ViT": (
        "a Vision Transformer",
        {"cls": (1, 1, 4), "embedding/kernel": (2, 2, 3, 4), "Transformer/posembed_input/pos_embedding": (1, 10, 4)}
        | under("Transformer/encoderblock_0/LayerNorm_0/", {"scale": (4,), "bias": (4,)})
        | under("Transformer/encoderblock_0/MlpBlock_3/Dense_0/", {"kernel": (4, 8), "bias": (8,)})
        | {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": (4, 2, 2)},
    ),
    "lucidrains' Mixer": (
        "mlp-mixer-pytorch.* rename",
        {"1.weight": (4, 12), "1.bias": (4,), "3.weight": (4,), "3.bias": (4,), "5.weight": (3, 4), "5.bias": (3,)}
        | under("2.0.norm.", NORM) | under("2.1.norm.", NORM)
        | {"2.0.fn.0.weight": (16, 9, 1), "2.0.fn.0.bias": (16,), "2.0.fn.3.weight": (9, 16, 1), "2.0.fn.3.bias": (9,)}
        | {"2.1.fn.0.weight": (2, 4), "2.1.fn.0.bias": (2,), "2.1.fn.3.weight": (4, 2), "2.1.fn.3.bias": (4,)},
    ),
}  # fmt: skip


def zeros(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    return safetensors(folder, {name: np.zeros(shape, "float32") for name, shape in shapes.items()})
