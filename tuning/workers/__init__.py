"""Workers on Ray, each with a replica of the model, and the scheduler that gives them work."""
