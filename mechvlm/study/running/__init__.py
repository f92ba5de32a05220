"""How a study runs: settings, folder, shards, workers, and the tables that the shards become."""
