"""What all figures share: one style, headings, and axes beside axes."""
