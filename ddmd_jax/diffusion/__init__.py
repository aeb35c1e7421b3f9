"""The flow: one process, one time; samplers, and images drawn with them."""
