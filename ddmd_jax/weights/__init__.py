"""How trees of parameters are stored: name maps and safetensors files."""
