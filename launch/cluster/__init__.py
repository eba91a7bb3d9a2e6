"""What runs on a SLURM cluster: submitting, checking before a start, coming back after an end."""
