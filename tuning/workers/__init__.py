"""Workers on Ray that each hold a replica of the model, and the scheduler that gives them work."""
