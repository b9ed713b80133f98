"""Answers to prompts, files of answers, and figures of them."""
