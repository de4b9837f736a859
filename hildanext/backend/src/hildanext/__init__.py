"""HILDA: any autoregressive transformer becomes an editable discrete-diffusion language model."""

__version__ = "0.1.0"
