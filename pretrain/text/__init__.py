"""Text beside images: captions of a data set, their tokens, and the tower that encodes them."""
