"""The embedded family: text to emoji."""
