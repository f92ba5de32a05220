"""Records that say where each Hugging Face class keeps its parts. They are data, not code."""
