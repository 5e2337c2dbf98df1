"""Where the log-probabilities that a policy is compared to come from."""
