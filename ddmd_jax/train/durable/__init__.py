"""Keeps a run from being lost: checkpoints, locks, signals, guards."""
