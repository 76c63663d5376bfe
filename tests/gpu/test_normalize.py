"""What the accelerator does to images has the same bits on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.augment import normalize
from pipeline.data.mixup import mix_images, mix_targets

pytestmark = pytest.mark.gpu


def test_normalizing_and_mixing_are_the_same_to_the_bit():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 64, 64), generator=g, dtype=torch.uint8)
    images[0, 0, :4] = torch.arange(256, dtype=torch.uint8).view(4, 64)
    partners, weights = torch.tensor([1, 2, 3, 4, 8, 6, 7, 0]), 0.5 + torch.rand(8, generator=g) / 2
    labels = torch.randint(0, 5, (9,), generator=g)

    def run(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        i, p, w, y = (x.to(device) for x in (images, partners, weights, labels))
        return mix_images(normalize(i), p, w).cpu(), mix_targets(y, p, w, 5).cpu()

    for on_gpu, on_cpu in zip(run("cuda"), run("cpu")):
        assert torch.equal(on_gpu, on_cpu)
