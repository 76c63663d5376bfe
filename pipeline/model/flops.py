"""What a model costs, exactly, and what a GPU can do at most: the halves of MFU (model FLOPs utilisation).

Pure arithmetic; imports nothing of torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelCost:
    """Trainable parameters, and multiply-accumulates of one image's forward pass (GEMMs only)."""

    parameters: int
    forward_macs: int

    @property
    def training_flops(self) -> int:
        """FLOPs to train on one image: 2 per MAC, the backward pass twice the forward; no recomputation."""
        return 6 * self.forward_macs


def mixer_cost(
    *,
    tokens: int,
    patch_values: int,
    hidden_dim: int,
    num_blocks: int,
    tokens_mlp_dim: int,
    channels_mlp_dim: int,
    num_classes: int,
) -> ModelCost:
    """Exact for `MlpMixer`: tokens S, patch_values in_chans*P*P, C, L, D_S, D_C, K (0: no head).

    Without the head the parameter counts are those of the paper's table 1, there in millions.
    """
    s, c, d_s, d_c, k = tokens, hidden_dim, tokens_mlp_dim, channels_mlp_dim, num_classes
    stem = patch_values * c + c
    token_mlp = 2 * s * d_s + d_s + s
    channel_mlp = 2 * c * d_c + d_c + c
    norms = 4 * c
    parameters = stem + num_blocks * (token_mlp + channel_mlp + norms) + 2 * c + (c + 1) * k
    macs = s * patch_values * c + num_blocks * (2 * c * s * d_s + 2 * s * c * d_c) + c * k
    return ModelCost(parameters, macs)


# TFLOP/s, dense (data sheets that quote "with sparsity" are halved), by a pattern for the name that
# `torch.cuda.get_device_name()` gives; the first match counts. Source: NVIDIA's data sheet of each product;
# for the GeForce cards the GA102 and Ada whitepapers (bf16 with fp32 accumulation). "fp32" is without tensor
# cores, which is what torch does unless TF32 is allowed. Left out: whatever a data sheet does not say.
_PEAK_TFLOPS: list[tuple[str, dict[str, float]]] = [
    (r"\bB200\b", {"bf16": 2250, "fp16": 2250, "tf32": 1125}),
    (r"\bH[12]00 NVL\b", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    (r"\bH100 PCIe\b", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51}),
    (r"\b(H100|H200|GH200)\b", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    (r"\bA100\b", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    (r"\bA40\b", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"\bA30\b", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    (r"\bA10\b", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    (r"\bL40S\b", {"bf16": 362.05, "fp16": 362.05, "tf32": 183, "fp32": 91.6}),
    (r"\bL40\b", {"bf16": 181.05, "fp16": 181.05, "tf32": 90.5, "fp32": 90.5}),
    (r"\bL4\b", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    (r"\bRTX 4090\b(?! (D|Laptop))", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"\bRTX 3090\b(?! Ti)", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    (r"\bV100-PCIE", {"fp16": 112, "fp32": 14}),  # no bf16 in hardware
    (r"\bV100-SXM2", {"fp16": 125, "fp32": 15.7}),
    (r"\bT4\b", {"fp16": 65, "fp32": 8.1}),
]


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak dense FLOP/s of one GPU, or None where it is not known (a CPU, an unlisted GPU or precision).

    device_name: as `torch.cuda.get_device_name()` gives it. precision: "bf16", "fp16", "tf32" or "fp32".
    """
    for pattern, peaks in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None
