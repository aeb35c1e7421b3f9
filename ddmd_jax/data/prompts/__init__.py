"""Sets of prompts: from files to a TFDS data set, and back."""
