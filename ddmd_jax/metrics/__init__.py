"""Metrics that mean something at 24 x 24 pixels, and the report they end up in."""
