"""The method: FlowAR, its flow head and its VAE. Nothing here imports util/ or the programs."""
from models.errors import FlowARError
from models.flowar import FlowAR
from models.registry import MODELS, build_model, load_flowar
from models.vae import AutoencoderKL
from models.vaes import load_vae

__all__ = ["MODELS", "AutoencoderKL", "FlowAR", "FlowARError", "build_model", "load_flowar", "load_vae"]
