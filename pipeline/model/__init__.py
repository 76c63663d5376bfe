"""Models by name. Importing this package does not import torch; building a model does."""

from pipeline.model.flops import ModelCost, peak_flops
from pipeline.model.registry import create_model, initial_values, list_models, model_cost

__all__ = ["ModelCost", "create_model", "initial_values", "list_models", "model_cost", "peak_flops"]
