"""The methods: each turns a fleet into the bases and pages of a bundle."""
