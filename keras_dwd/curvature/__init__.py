"""What shapes the precision: estimates of the Fisher information."""
