"""What all figures share: one look, headings, and axes beside axes."""
