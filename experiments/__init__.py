"""Long experiments: scripts that measure claims and write what they found to experiments/results/."""
