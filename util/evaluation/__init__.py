"""Sampling, metrics, references, what an evaluation keeps, reports, pictures."""
