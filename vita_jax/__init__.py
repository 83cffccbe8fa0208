"""VITA in JAX: train, convert and talk to models that see, listen and speak."""

__version__ = "0.1.0"
