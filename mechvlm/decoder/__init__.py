"""A model inside a trace: activations, attention and weights under uniform names.

This is the half of a `VLM` that travels to a server.
"""
