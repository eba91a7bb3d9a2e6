"""`selfsight dashboard`: a workspace in wandb for runs, and sending it what they wrote offline."""
