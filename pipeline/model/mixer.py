"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601), the network and its initial values.

Imports torch alone: parallelism, compilation and activation checkpointing are applied from outside, by
wrapping `model.blocks[i]`. Letters as in the paper: B batch, S tokens, C channels, D_S and D_C hidden widths,
L blocks, P patch size, K classes. Parameter names are timm's.

Between stem and head the activations lie token-major, [S, B, C]. Then every layer is plain 2-D GEMMs whose
operands and results all lie as they are stored; a transpose is at most a flag to the GEMM, never a copy:

* token mixing:    H [B*C, D_S] = X^T W_1^T with X viewed as [S, B*C], then [S, B*C] = W_2 H^T
* channel mixing:  X viewed as [S*B, C] times W_3^T [C, D_C], and back

With batch-major activations token mixing has to copy its input and its output to swap S and C (and again in
the backward pass), or else multiply once per image, which makes the weight gradient one [D_S, S] copy per
image, summed afterwards. A second gain is alignment: 16-bit tensor-core kernels want rows of a multiple of 16
bytes, and S is 196 or 49 at 224 pixels. Batch-major code has rows of S values in its large operands; here
only W_1 does, which is small enough to be laid out anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6  # Flax's default, which the released models use; torch's is 1e-5
_STD_OF_CUT_NORMAL = 0.87962566103423978  # standard deviation of N(0, 1) cut at +-2


class PatchProjection(nn.Module):
    """The weights of the P x P, stride P convolution, applied as one GEMM to unfolded patches.

    A convolution whose windows do not overlap is a matrix product. As a GEMM it needs no cuDNN algorithm
    search, no layout change in 16 bit, and no memory format on the weight (FSDP2 refuses `channels_last`
    weights).
    """

    def __init__(self, in_chans: int, patch_size: int, hidden_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_dim, in_chans, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(hidden_dim))

    def forward(self, patches: Tensor) -> Tensor:
        """patches [S, B, in_chans*P*P] -> [S, B, C]."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Cuts images into patches (raster order) and projects each to C channels. Paper section 2."""

    def __init__(self, image_size: tuple[int, int], patch_size: int, in_chans: int, hidden_dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.proj = PatchProjection(in_chans, patch_size, hidden_dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> [S, B, C]. Raises ValueError for images of another shape."""
        batch, size, p = images.shape[0], self.image_size, self.patch_size
        if images.shape[1:] != (self.in_chans, *size):
            raise ValueError(
                f"this Mixer takes images of shape [B, {self.in_chans}, {size[0]}, {size[1]}], "
                f"got {list(images.shape)}; its token MLPs fix the image size"
            )
        rows, cols = size[0] // p, size[1] // p
        grid = images.reshape(batch, self.in_chans, rows, p, cols, p)
        # The copy that unfolds the patches is needed anyhow; it also puts the tokens first.
        patches = grid.permute(2, 4, 0, 1, 3, 5).reshape(rows * cols, batch, self.in_chans * p * p)
        return self.proj(patches)


class ReadTokens(nn.Module):
    """First linear map of token mixing: x [S, N] -> H [N, D_S], H = x^T W^T + b, one GEMM.

    Not `nn.Linear`, because of the layout of its weight; a module at all, so that ZeRO-3's forward hooks
    gather it.
    """

    def __init__(self, tokens: int, tokens_mlp_dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = nn.Parameter(torch.empty(tokens_mlp_dim, tokens))
        self.bias = nn.Parameter(torch.empty(tokens_mlp_dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.tokens % 8:
            # Stored column by column, its rows are D_S long instead of S, which aligns every operand of the
            # forward and of both backward GEMMs; the values are the same. S*D_S values: no cost beside B*C*S.
            weight = weight.t().contiguous().t()
        return F.linear(x.t(), weight, self.bias)


class WriteTokens(nn.Module):
    """Second linear map of token mixing: H [N, D_S] -> y [S, N], y = W H^T + b, one GEMM."""

    def __init__(self, tokens: int, tokens_mlp_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, tokens_mlp_dim))
        self.bias = nn.Parameter(torch.empty(tokens))

    def forward(self, h: Tensor) -> Tensor:
        return torch.addmm(self.bias.unsqueeze(1), self.weight, h.t())


class TokenMlp(nn.Module):
    """W_2 gelu(W_1 X): equation 1, first line, without norm and skip. [S, B, C] -> [S, B, C]."""

    def __init__(self, tokens: int, tokens_mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = ReadTokens(tokens, tokens_mlp_dim)
        self.fc2 = WriteTokens(tokens, tokens_mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(x.flatten(1)), approximate="tanh"))
        return y.view(x.shape)


class ChannelMlp(nn.Module):
    """W_4 gelu(W_3 X): equation 1, second line, without norm and skip. [S, B, C] -> [S, B, C]."""

    def __init__(self, hidden_dim: int, channels_mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_dim, channels_mlp_dim)
        self.fc2 = nn.Linear(channels_mlp_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        # The tanh form is Flax's `nn.gelu` default and so the published networks'; torch's default is erf.
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class MixerBlock(nn.Module):
    """One Mixer layer, equation 1. A pure function of its arguments, so it may be recomputed or compiled."""

    def __init__(self, tokens: int, hidden_dim: int, tokens_mlp_dim: int, channels_mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)
        self.mlp_tokens = TokenMlp(tokens, tokens_mlp_dim)
        self.norm2 = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)
        self.mlp_channels = ChannelMlp(hidden_dim, channels_mlp_dim)

    def forward(self, x: Tensor, keep_token: Tensor | None = None, keep_channel: Tensor | None = None) -> Tensor:
        """x [S, B, C]; keep_token, keep_channel [B], 0 or 1, None to keep the branch -> [S, B, C]."""
        x = x + _drop(self.mlp_tokens(self.norm1(x)), keep_token)
        return x + _drop(self.mlp_channels(self.norm2(x)), keep_channel)


def _drop(branch: Tensor, keep: Tensor | None) -> Tensor:
    """Residual branch [S, B, C] times keep [B]. Not rescaled by 1/(1-p), as in the authors' code."""
    return branch if keep is None else branch * keep.to(branch.dtype).unsqueeze(-1)


class MlpMixer(nn.Module):
    """The whole network: images [B, in_chans, H, W] -> logits [B, num_classes].

    Stem, L blocks, LayerNorm, mean over tokens, linear head; no position embedding (section 2). With
    `num_classes=0` there is no head and `forward` returns the pooled features [B, C].

    Built on a real device it holds its initial values for seed 0. Built on the meta device: `to_empty`, then
    `reset_parameters`; where parameters are sharded, `init_parameter` gives each one's values.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int | tuple[int, int] = 224,
        *,
        patch_size: int,
        hidden_dim: int,
        num_blocks: int,
        tokens_mlp_dim: int,
        channels_mlp_dim: int,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}")
        tokens = (height // patch_size) * (width // patch_size)
        self.num_classes = num_classes
        self.drop_path_rate = drop_path_rate
        self.stem = PatchEmbed((height, width), patch_size, in_chans, hidden_dim)
        self.blocks = nn.ModuleList(
            MixerBlock(tokens, hidden_dim, tokens_mlp_dim, channels_mlp_dim) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(hidden_dim, num_classes) if num_classes else nn.Identity()
        if not self.norm.weight.is_meta:
            self.reset_parameters()

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [B, K] of images [B, in_chans, H, W].

        keep [B, 2L], 0 or 1: column 2i keeps the token branch of block i, column 2i+1 its channel branch. The
        model draws nothing itself: None keeps every branch, in training too, whatever `drop_path_rate` says.
        """
        return self.head(self.forward_features(images, keep))

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pooled features [B, C], the head's input (`pre_logits` in the authors' code)."""
        x = self.stem(images)
        for i, block in enumerate(self.blocks):
            if keep is None:
                x = block(x)
            else:
                x = block(x, keep[:, 2 * i], keep[:, 2 * i + 1])
        return self.norm(x).mean(dim=0)

    def drop_rates(self) -> list[float]:
        """The probability of dropping each residual branch, length 2L, in the order of `keep`'s columns.

        Block i of L drops each of its two branches, independently, with s*i/(L-1), where s is
        `drop_path_rate`: so the authors' code (big_vision, models/mlp_mixer.py). The paper's words differ
        slightly: "linearly from 0 for the first MLP to s for the last MLP" (section 3) would give MLP j of 2L
        the rate s*j/(2L-1).
        """
        last = max(len(self.blocks) - 1, 1)
        return [self.drop_path_rate * i / last for i in range(len(self.blocks)) for _ in range(2)]

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0, head_bias: float = 0.0) -> None:
        """Sets every (unsharded) parameter to its initial value; see `init_parameter`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(init_parameter(name, parameter.shape, seed, head_bias))


def init_parameter(name: str, shape: Sequence[int], seed: int = 0, head_bias: float = 0.0) -> Tensor:
    """Initial values of the parameter `name`, fp32 on the CPU, a function of the arguments alone.

    The authors' (Flax) initialisation: kernels LeCun normal cut at two sigma, biases 0, LayerNorm 1 and 0,
    the head 0. `head_bias` fills the head's bias; with a sigmoid loss over many classes a negative one (-6.9
    for ImageNet in big_vision's mlp_mixer_i1k.py) makes the first predictions as rare as the classes are.

    Wrappers' name parts (`_orig_mod`, `_checkpoint_wrapped_module`, ...) are ignored. Every parameter has its
    own generator, so neither the order of creation nor the sharding changes a value. Raises ValueError for a
    name that no rule covers.
    """
    parts = [part for part in name.split(".") if not part.startswith("_")]
    if parts[0] == "head":
        return torch.full(tuple(shape), head_bias if parts[-1] == "bias" else 0.0)
    if parts[-1] == "bias":
        return torch.zeros(tuple(shape))
    if parts[-1] == "weight" and len(parts) > 1 and parts[-2].startswith("norm"):
        return torch.ones(tuple(shape))
    if parts[-1] == "weight" and len(shape) >= 2:
        return _lecun_normal(".".join(parts), tuple(shape), seed)
    raise ValueError(f"no rule to initialise parameter {name!r} of shape {list(shape)}")


def _lecun_normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal with variance 1/fan_in, cut at two standard deviations of the uncut normal.

    `jax.nn.initializers.lecun_normal`: the uncut normal is widened so that the cut one has the wanted
    variance. Written out (inverse of the normal's distribution function) because torch's `trunc_normal_` does
    not promise the same values from version to version.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    edge = math.erf(2 / math.sqrt(2))  # the cut, on the scale of erf
    std = math.sqrt(1 / math.prod(shape[1:])) / _STD_OF_CUT_NORMAL
    values = torch.rand(shape, generator=generator, dtype=torch.float32)
    values.mul_(2 * edge).sub_(edge).erfinv_().mul_(math.sqrt(2) * std)
    return values.clamp_(-2 * std, 2 * std)  # against the last bit's rounding
