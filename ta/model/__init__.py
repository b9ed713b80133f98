"""Folders to a module that gives losses, log-probabilities and scores, and back to folders."""
