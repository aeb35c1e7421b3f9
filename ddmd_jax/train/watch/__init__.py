"""What shows how a run goes: logs, trackers, profiles."""
