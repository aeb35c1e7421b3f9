"""Mesh, sharding rules, and the processes of one run."""
