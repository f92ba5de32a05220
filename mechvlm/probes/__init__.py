"""One method a file: plain tensor functions, the probe that reads for them, and its result."""
