"""Running on NDIF: what travels to its servers, requests, and jobs."""
