"""One file a probe, each with its `SPEC`: a new file here is a new probe."""
