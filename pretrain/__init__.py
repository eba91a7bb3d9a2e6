"""Self-supervised pretraining: configuration, methods, encoders and the training loop."""
