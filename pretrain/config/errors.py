"""What is raised for a configuration that can't be run."""


class ConfigError(ValueError):
    """A configuration that can't be run; the message names the key, the value, what is allowed."""
