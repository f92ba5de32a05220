"""How a study runs: its settings and folder, shards, and who makes them."""
