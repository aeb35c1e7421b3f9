"""Lumina-Image-2.0."""
