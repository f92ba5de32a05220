"""A loaded vision-language model: loading, verifying, answering, and TransformerLens' view of it."""
