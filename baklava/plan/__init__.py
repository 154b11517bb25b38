"""What a plan is: budgets, geometry and the bytes that they take, without torch."""
