"""To and from what the field already has: official checkpoints come in, encoders go out."""
