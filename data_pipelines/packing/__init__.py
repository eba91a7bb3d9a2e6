"""Images from anywhere into shards."""
