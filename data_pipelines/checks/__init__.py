"""Looking at a data set: errors, duplicates, statistics, pictures."""
