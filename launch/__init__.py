"""The `selfsight` command and how processes are started."""
