"""Servers elsewhere as engines."""
