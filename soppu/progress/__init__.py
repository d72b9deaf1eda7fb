"""How far a run is: the lines that its stages write, and what they come to for whoever reads them."""
