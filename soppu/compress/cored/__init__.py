"""Users who are cores in one basis: they enter a bundle as they are, and nothing is fitted."""
