"""Real images: where they come from, their pixels, and their latents on disk."""
