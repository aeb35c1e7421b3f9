"""Shows how a run goes: logs, trackers, profiles."""
