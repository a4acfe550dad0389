"""The method: FlowAR, its flow head and its VAE. Nothing here imports util/ or the programs."""
from models.errors import FlowARError
from models.flowar import MODELS, FlowAR, build_model
from models.vae import AutoencoderKL

__all__ = ["MODELS", "AutoencoderKL", "FlowAR", "FlowARError", "build_model"]
