"""The gateway: one address where a user reaches their own model, and nobody else's."""
