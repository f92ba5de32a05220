"""What one experiment does to a model, and what it shows: each one function that returns a typed result."""
