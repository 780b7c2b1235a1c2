"""The PyTorch formulation that the `reference` layout names: einops layers in nn.Sequential, written from the equations."""

from functools import partial

from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from convert import MixerConfig


class FeedForward(nn.Module):
    def __init__(self, features: int, hidden: int, gelu: nn.Module):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, hidden), gelu, nn.Dropout(0), nn.Linear(hidden, features), nn.Dropout(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MixerBlock(nn.Module):
    def __init__(self, config: MixerConfig):
        super().__init__()
        gelu = nn.GELU(approximate={"tanh": "tanh", "exact": "none"}[config.gelu])
        norm = partial(nn.LayerNorm, config.hidden_dim, eps=config.layer_norm_epsilon)
        self.token_mix = nn.Sequential(
            norm(),
            Rearrange("b n c -> b c n"),
            FeedForward(config.num_tokens, config.tokens_mlp_dim, gelu),
            Rearrange("b c n -> b n c"),
        )
        self.channel_mix = nn.Sequential(norm(), FeedForward(config.hidden_dim, config.channels_mlp_dim, gelu))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(x)
        return x + self.channel_mix(x)


class MlpMixer(nn.Module):
    def __init__(self, config: MixerConfig):
        super().__init__()
        stem = nn.Conv2d(config.in_channels, config.hidden_dim, config.patch_size, config.patch_size)
        self.to_patch_embedding = nn.Sequential(stem, Rearrange("b c h w -> b (h w) c"))
        self.mixer_blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.num_blocks))
        self.layer_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_epsilon)
        self.mean = Reduce("b n c -> b c", "mean")
        self.mlp_head = nn.Sequential(nn.Linear(config.hidden_dim, config.num_classes))

    def forward(self, images: Tensor) -> Tensor:
        x = self.to_patch_embedding(images)
        for block in self.mixer_blocks:
            x = block(x)
        return self.mlp_head(self.mean(self.layer_norm(x)))
