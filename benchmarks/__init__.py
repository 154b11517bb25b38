"""What baklava costs and gains in time and memory, next to its peer on the same machine, in the same process."""
