"""A loaded model: loading, verifying, answering, and the same model as TransformerLens sees it."""
