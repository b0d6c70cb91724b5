"""What turns arrays into activations: bodies, taps, engines."""
