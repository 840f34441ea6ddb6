"""The gate: learned numbers that say which arm should answer, and the rules that turn them into a decision."""
