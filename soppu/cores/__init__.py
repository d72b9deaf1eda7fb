"""Users inside a basis that others have made: what a core is, how it is made of an adapter, and its files."""
