"""Where each Hugging Face class keeps its parts: records, which are data."""
