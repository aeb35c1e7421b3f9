"""A run as one page: what it was, what it did, what came of it."""
