"""Pairwise comparison of answers by a judge."""
