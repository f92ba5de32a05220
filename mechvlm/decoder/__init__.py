"""The half of a model that travels to a server: activations, attention and weights under uniform names."""
