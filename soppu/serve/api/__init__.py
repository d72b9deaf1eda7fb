"""HTTP: LoRAX's generation routes, health, and the admin routes."""
