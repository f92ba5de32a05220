"""Images and prompts become a padded batch and a map of its positions."""
