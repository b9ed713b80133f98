"""Align language models with plain functions: data in, data out."""

__version__ = "0.1.0"
