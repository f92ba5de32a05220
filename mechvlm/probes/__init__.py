"""One method per file: plain tensor functions, the probe that reads a forward, and its result."""
