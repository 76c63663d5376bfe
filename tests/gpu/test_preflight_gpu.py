"""The preflight's look at real GPUs: their number, speed and memory."""

import pytest
import torch

from launch.preflight import check_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_gpus_are_fit_and_counted():
    count, report = torch.cuda.device_count(), {}
    assert check_gpus(count, report) == []
    assert len(report["tflops"]) == count and min(report["tflops"]) > 1
    assert check_gpus(count + 1, report) == [f"{count} GPUs instead of {count + 1}"]
