"""THE table: what every layout calls the nine modules of a Mixer, and how it orders their axes.

A layout is a column. `{i}` in a name is the block index, counted from 0; a column whose block names have none keeps the
blocks as a leading axis `l`. `{leaf}` is where the leaf's name goes. Every transpose and reshape follows from the axis orders
of two columns, in both directions; an axis `1` is written, and a file that is read may lack or repeat it. Canonical means
google's names and axes.
"""

__all__ = ["ALIASES", "LAYOUTS", "Layout", "layout_named"]

from dataclasses import dataclass, replace

from .config import Gelu

# Modules in the order of the forward pass: their kind, and which sizes their input and output have.
MODULES: dict[str, tuple[str, str, str]] = {
    "stem": ("stem", "in_channels", "hidden_dim"),
    "token_norm": ("norm", "hidden_dim", "hidden_dim"),
    "token_mixing/dense_0": ("mlp", "num_tokens", "tokens_mlp_dim"),
    "token_mixing/dense_1": ("mlp", "tokens_mlp_dim", "num_tokens"),
    "channel_norm": ("norm", "hidden_dim", "hidden_dim"),
    "channel_mixing/dense_0": ("mlp", "hidden_dim", "channels_mlp_dim"),
    "channel_mixing/dense_1": ("mlp", "channels_mlp_dim", "hidden_dim"),
    "pre_head_norm": ("norm", "hidden_dim", "hidden_dim"),
    "head": ("head", "hidden_dim", "num_classes"),
}
BLOCK_MODULES = tuple(MODULES)[1:7]

WEIGHT, BIAS = 0, 1  # the two arrays of every module
Leaves = dict[str, dict[str, str]]  # kind of module -> {leaf name: axes}: the weight first, then the bias

FLAX_LEAVES: Leaves = {
    "stem": {"kernel": "h w i o", "bias": "o"},
    "norm": {"scale": "o", "bias": "o"},
    "mlp": {"kernel": "i o", "bias": "o"},
    "head": {"kernel": "i o", "bias": "o"},
}
TORCH_LEAVES: Leaves = {
    "stem": {"weight": "o i h w", "bias": "o"},
    "norm": {"weight": "o", "bias": "o"},
    "mlp": {"weight": "o i", "bias": "o"},
    "head": {"weight": "o i", "bias": "o"},
}


@dataclass(frozen=True)
class Layout:
    """One column: names, axes, and what the code that owns the names computes unless a file says otherwise."""

    name: str
    modules: dict[str, str]
    leaves: Leaves
    gelu: Gelu = "tanh"
    layer_norm_epsilon: float = 1e-6
    preprocessing: str | None = "resmall_crop"
    numerics_known: bool = False  # every file without metadata has these numerics, as all of Google's do
    tanh_remedy: str = ""  # what makes code of the exact GELU compute the tanh one
    size_arguments: str = ""  # constructor arguments for sizes other than those of a variant at 224 pixels
    note_without_head: str = ""  # what the loader of the layout's own code does with weights without a head
    below_leaves: str = ""  # a level that the owner's state has below every leaf
    spellings: tuple["Layout", ...] = ()  # names that are read as well and never written

    @property
    def stacked(self) -> bool:
        """Whether the block index is an axis instead of part of the name."""
        return "{i}" not in self.modules["token_norm"]


GOOGLE = Layout(
    name="google",  # google-research/vision_transformer, models_mixer.py: the published files
    modules={
        "stem": "stem/{leaf}",
        "token_norm": "MixerBlock_{i}/LayerNorm_0/{leaf}",
        "token_mixing/dense_0": "MixerBlock_{i}/token_mixing/Dense_0/{leaf}",
        "token_mixing/dense_1": "MixerBlock_{i}/token_mixing/Dense_1/{leaf}",
        "channel_norm": "MixerBlock_{i}/LayerNorm_1/{leaf}",
        "channel_mixing/dense_0": "MixerBlock_{i}/channel_mixing/Dense_0/{leaf}",
        "channel_mixing/dense_1": "MixerBlock_{i}/channel_mixing/Dense_1/{leaf}",
        "pre_head_norm": "pre_head_layer_norm/{leaf}",
        "head": "head/{leaf}",
    },
    leaves=FLAX_LEAVES,
    numerics_known=True,
    note_without_head="Google's loader stops without head/kernel and head/bias; --num-classes N writes them, as zeros",
)

FLAX = Layout(
    name="flax",  # mixer_jax.MlpMixer
    modules={module: ("blocks/" if module in BLOCK_MODULES else "") + f"{module}/{{leaf}}" for module in MODULES},
    leaves=FLAX_LEAVES,
    below_leaves="value",  # as nnx.state(model) has it
)
UNSTACKED = {module: name.replace("blocks/", "blocks/{i}/") for module, name in FLAX.modules.items()}
FLAX = replace(FLAX, spellings=(replace(FLAX, modules=UNSTACKED),))  # mixer_jax.MlpMixer.unstacked

TIMM = Layout(
    name="timm",  # timm.models.mlp_mixer.MlpMixer, and mixer_jax.torch_model
    modules={
        "stem": "stem.proj.{leaf}",
        "token_norm": "blocks.{i}.norm1.{leaf}",
        "token_mixing/dense_0": "blocks.{i}.mlp_tokens.fc1.{leaf}",
        "token_mixing/dense_1": "blocks.{i}.mlp_tokens.fc2.{leaf}",
        "channel_norm": "blocks.{i}.norm2.{leaf}",
        "channel_mixing/dense_0": "blocks.{i}.mlp_channels.fc1.{leaf}",
        "channel_mixing/dense_1": "blocks.{i}.mlp_channels.fc2.{leaf}",
        "pre_head_norm": "norm.{leaf}",
        "head": "head.{leaf}",
    },
    leaves=TORCH_LEAVES,
    gelu="exact",
    preprocessing="timm_bicubic",
    size_arguments="mlp_ratio={mlp_ratio}, img_size={image_size}",
    tanh_remedy='act_layer=partial(nn.GELU, approximate="tanh")',
)

REFERENCE = Layout(
    name="reference",  # benchmarks/torch_reference.py
    modules={
        "stem": "to_patch_embedding.0.{leaf}",
        "token_norm": "mixer_blocks.{i}.token_mix.0.{leaf}",
        "token_mixing/dense_0": "mixer_blocks.{i}.token_mix.2.net.0.{leaf}",
        "token_mixing/dense_1": "mixer_blocks.{i}.token_mix.2.net.3.{leaf}",
        "channel_norm": "mixer_blocks.{i}.channel_mix.0.{leaf}",
        "channel_mixing/dense_0": "mixer_blocks.{i}.channel_mix.1.net.0.{leaf}",
        "channel_mixing/dense_1": "mixer_blocks.{i}.channel_mix.1.net.3.{leaf}",
        "pre_head_norm": "layer_norm.{leaf}",
        "head": "mlp_head.0.{leaf}",
    },
    leaves=TORCH_LEAVES,
    gelu="exact",
    layer_norm_epsilon=1e-5,  # torch's default
    preprocessing=None,
    tanh_remedy='nn.GELU(approximate="tanh")',
)

JEONSWORLD = Layout(
    name="jeonsworld",  # jeonsworld/MLP-Mixer-Pytorch
    modules={
        "stem": "stem.{leaf}",
        "token_norm": "layer.{i}.pre_norm.{leaf}",
        "token_mixing/dense_0": "layer.{i}.token_mlp_block.fc0.{leaf}",
        "token_mixing/dense_1": "layer.{i}.token_mlp_block.fc1.{leaf}",
        "channel_norm": "layer.{i}.post_norm.{leaf}",
        "channel_mixing/dense_0": "layer.{i}.channel_mlp_block.fc0.{leaf}",
        "channel_mixing/dense_1": "layer.{i}.channel_mlp_block.fc1.{leaf}",
        "pre_head_norm": "pre_head_ln.{leaf}",
        "head": "head.{leaf}",
    },
    leaves=TORCH_LEAVES,
    gelu="exact",
    preprocessing=None,
    tanh_remedy='nn.GELU(approximate="tanh")',
)

MMPRETRAIN = Layout(
    name="mmpretrain",  # open-mmlab/mmpretrain, MlpMixer with a LinearClsHead
    modules={
        "stem": "backbone.patch_embed.projection.{leaf}",
        "token_norm": "backbone.layers.{i}.ln1.{leaf}",
        "token_mixing/dense_0": "backbone.layers.{i}.token_mix.layers.0.0.{leaf}",
        "token_mixing/dense_1": "backbone.layers.{i}.token_mix.layers.1.{leaf}",
        "channel_norm": "backbone.layers.{i}.ln2.{leaf}",
        "channel_mixing/dense_0": "backbone.layers.{i}.channel_mix.layers.0.0.{leaf}",
        "channel_mixing/dense_1": "backbone.layers.{i}.channel_mix.layers.1.{leaf}",
        "pre_head_norm": "backbone.ln1.{leaf}",
        "head": "head.fc.{leaf}",
    },
    leaves=TORCH_LEAVES,
    gelu="exact",
    layer_norm_epsilon=1e-5,
    preprocessing="timm_bicubic",
    tanh_remedy='act_cfg=dict(type="GELU", approximate="tanh")',
)

MLX = Layout(
    name="mlx",  # Apple's MLX, whose convolutions order their axes in their own way; its numerics are MLX's defaults
    modules={
        "stem": "patch_embedding.conv.{leaf}",
        "token_norm": "blocks.{i}.ln0.{leaf}",
        "token_mixing/dense_0": "blocks.{i}.token_mixing.layers.0.{leaf}",
        "token_mixing/dense_1": "blocks.{i}.token_mixing.layers.2.{leaf}",
        "channel_norm": "blocks.{i}.ln1.{leaf}",
        "channel_mixing/dense_0": "blocks.{i}.channel_mixing.layers.0.{leaf}",
        "channel_mixing/dense_1": "blocks.{i}.channel_mixing.layers.2.{leaf}",
        "pre_head_norm": "pre_head_ln.{leaf}",
        "head": "head.{leaf}",
    },
    leaves=TORCH_LEAVES | {"stem": {"weight": "o h w i", "bias": "o"}},
    gelu="exact",
    layer_norm_epsilon=1e-5,
    preprocessing=None,
    tanh_remedy='nn.GELU(approx="precise")',
)

LEGACY = Layout(
    name="legacy",  # the older names that google-research/big_vision, mlp_mixer.py, still maps
    modules={
        "stem": "embedding/{leaf}",
        "token_norm": "Mixer/encoderblock_{i}/LayerNorm_0/{leaf}",
        "token_mixing/dense_0": "Mixer/encoderblock_{i}/token_mixing_phase_0/{leaf}1",
        "token_mixing/dense_1": "Mixer/encoderblock_{i}/token_mixing_phase_0/{leaf}2",
        "channel_norm": "Mixer/encoderblock_{i}/LayerNorm_1/{leaf}",
        "channel_mixing/dense_0": "Mixer/encoderblock_{i}/channel_mixing_phase_0/{leaf}1",
        "channel_mixing/dense_1": "Mixer/encoderblock_{i}/channel_mixing_phase_0/{leaf}2",
        "pre_head_norm": "Mixer/encoder_norm/{leaf}",
        "head": "head/{leaf}",
    },
    leaves=FLAX_LEAVES | {"mlp": {"kernel": "1 i o", "bias": "1 o"}},
    numerics_known=True,
    note_without_head=GOOGLE.note_without_head,
)

# Before Flax Linen submodules were numbered across classes. Inferred from Flax's own conversion; no such file is known.
PRE_LINEN = replace(
    LEGACY,
    modules=LEGACY.modules
    | {
        "token_mixing/dense_0": "Mixer/encoderblock_{i}/token_mixing_phase_1/{leaf}1",
        "token_mixing/dense_1": "Mixer/encoderblock_{i}/token_mixing_phase_1/{leaf}2",
        "channel_norm": "Mixer/encoderblock_{i}/LayerNorm_2/{leaf}",
        "channel_mixing/dense_0": "Mixer/encoderblock_{i}/channel_mixing_phase_3/{leaf}1",
        "channel_mixing/dense_1": "Mixer/encoderblock_{i}/channel_mixing_phase_3/{leaf}2",
    },
)
LEGACY = replace(LEGACY, spellings=(PRE_LINEN,))

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (GOOGLE, FLAX, TIMM, REFERENCE, JEONSWORLD, MMPRETRAIN, MLX, LEGACY)
}
ALIASES = {"npz": "google", "torch": "timm"}  # other names that commands accept

# Patterns of names that only other networks have, to say what a wrong file is. All separators are "/" here.
FOREIGN: dict[str, str] = {
    "a gMLP, whose channel mixing is gated by tokens": r"/gate/(proj|norm)/",
    "a ResMLP, which has one linear layer for tokens and scales instead of LayerNorm": r"/linear_tokens/|/norm1/alpha$",
    "a ConvMixer": r"(^|/)blocks/\d+/0/fn/\d|^\d+/0/fn/\d/running_mean$",
    "lucidrains' mlp-mixer-pytorch, whose names depend on the depth: rename its arrays": r"(^|/)\d+/[01]/fn/\d/weight$",
    "a Vision Transformer": r"(^|/)(cls|cls_token|pos_embed|Transformer)(/|$)|/attn/qkv/|/attention/",
    "a ResNet": r"(^|/)(layer1/0|conv_root|block1)/",
}


def layout_named(name: str) -> Layout:
    """The column of a layout's name or alias."""
    try:
        return LAYOUTS[ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(f"no layout {name!r}: one of {', '.join([*LAYOUTS, *ALIASES])}") from None
