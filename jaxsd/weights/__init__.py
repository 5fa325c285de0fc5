"""Weights: safetensors files in both layouts <-> a Model or a Network, strictly."""

from jaxsd.weights.adapter_writing import save_adapter
from jaxsd.weights.adapters import Adapter, load_adapter, merge
from jaxsd.weights.configs import write_config
from jaxsd.weights.embeddings import Embedding, load_embedding, save_embedding
from jaxsd.weights.ip_adapters import load_ip_adapter
from jaxsd.weights.merging import merge_models
from jaxsd.weights.model import IPAdapter, Model, Network
from jaxsd.weights.parts import (
    load_controlnet,
    load_depth_estimator,
    load_detector,
    load_face_restorer,
    load_image_encoder,
    load_t2i_adapter,
    load_upscaler,
    load_vae,
    save_network,
)
from jaxsd.weights.reading import load
from jaxsd.weights.writing import save

__all__ = ['Adapter', 'Embedding', 'IPAdapter', 'Model', 'Network', 'load', 'load_adapter',
           'load_controlnet', 'load_depth_estimator', 'load_detector', 'load_embedding',
           'load_face_restorer', 'load_image_encoder', 'load_ip_adapter', 'load_t2i_adapter',
           'load_upscaler', 'load_vae', 'merge', 'merge_models', 'save', 'save_adapter',
           'save_embedding', 'save_network', 'write_config']
