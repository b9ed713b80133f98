"""Retrieval: passages, text encoders, indexes, and training retriever and generator together."""
