"""Answers of one or several models to held-out prompts."""
