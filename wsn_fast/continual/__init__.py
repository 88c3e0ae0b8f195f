"""Training on one task after another: where tasks begin and end, and how finished tasks are kept to the bit."""
