"""From images and prompts to a padded batch, and what each of its positions is."""
