"""A data set: where its shards lie, here and elsewhere, and how a sample is found in them."""
