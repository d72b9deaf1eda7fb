"""Which arm answers a request: the base model, the user's own adapter, or a cheaper form of it."""
