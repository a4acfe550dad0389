"""Sampling, metrics, references, what an evaluation keeps, reports, pictures; the door from Python: load_pipeline."""
from util.evaluation.pipeline import load_pipeline  # noqa: F401
