"""A feature store: what an encoder makes of every image of a data set, computed once and read by every probe."""
