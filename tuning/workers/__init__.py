"""Ray actors that hold a model replica each and score plans."""
