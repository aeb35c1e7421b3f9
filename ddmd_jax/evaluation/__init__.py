"""Suites of prompts and measures, the evaluation at a run's end, tables and pictures."""
