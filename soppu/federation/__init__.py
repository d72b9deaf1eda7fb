"""FedBiOT without the framework: emulator, alignment, training, and what travels."""
