"""What the fitted heads share: checked data, folds, the logistic solver."""
