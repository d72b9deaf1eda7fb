"""One LoRA trained on everybody's text at one place: what a federation is measured against."""
