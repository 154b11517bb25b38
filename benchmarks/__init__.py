"""What baklava costs and gains in time, memory and fidelity, compared with its peers on the same machine."""
