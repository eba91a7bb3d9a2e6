"""Images to shards to crops; knows nothing of methods or of models."""
