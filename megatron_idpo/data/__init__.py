"""Preference pairs, from files to packed rows."""
