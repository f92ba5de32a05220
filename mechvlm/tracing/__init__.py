"""Reading and changing activations inside a trace."""
