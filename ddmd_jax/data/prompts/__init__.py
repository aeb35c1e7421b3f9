"""Sets of prompts: from files to a folder that is read at random."""
