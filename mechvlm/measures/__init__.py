"""Plain numbers, no model: words against captions, curves and their phases."""
