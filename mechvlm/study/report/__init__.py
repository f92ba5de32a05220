"""What a study looks like: figures, the report's page, its gallery, and what the terminal prints."""
