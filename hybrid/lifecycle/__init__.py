"""What needs both training and serving: jobs in the background, and the first hour of a home."""
