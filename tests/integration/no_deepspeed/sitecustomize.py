"""Test-only: with this folder on PYTHONPATH, DeepSpeed cannot be imported, as where it is not installed or broken."""

import sys

sys.modules["deepspeed"] = None  # type: ignore[assignment]
