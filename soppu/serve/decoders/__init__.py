"""One forward pass of the base model with an adapter a row."""
