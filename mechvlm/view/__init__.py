"""What results look like: figures."""
