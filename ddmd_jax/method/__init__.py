"""Decoupled DMD (arXiv 2511.22677): objectives, schedules, recipe, health."""
