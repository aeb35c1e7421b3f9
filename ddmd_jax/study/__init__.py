"""The paper's claims as experiments: runs, what is read off them, a verdict on each, a report."""
