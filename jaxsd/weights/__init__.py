"""Weights: safetensors files in both layouts <-> a Model, strictly."""

from jaxsd.weights.configs import write_config
from jaxsd.weights.model import Model
from jaxsd.weights.reading import load
from jaxsd.weights.writing import save

__all__ = ['Model', 'load', 'save', 'write_config']
