"""Released weights trained on: what of them learns, how they are held, and whether they got better or worse."""
