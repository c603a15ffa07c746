"""Training: settings, stages and the loop that runs them."""
