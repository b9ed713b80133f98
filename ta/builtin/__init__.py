"""Tiny models and generated records, made in code."""
