"""A student for others to load: a diffusers pipeline, safetensors, or an Orbax checkpoint."""
