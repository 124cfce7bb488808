"""Fine-tuning: training a backbone further, from the fitted head on."""
