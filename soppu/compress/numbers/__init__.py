"""From singular components to small integers: what numbers cost, and what they lose."""
