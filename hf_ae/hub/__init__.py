"""A folder as a Hub repository: the code it carries, its card, its check, its upload."""
