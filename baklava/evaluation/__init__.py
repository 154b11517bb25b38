"""What plans cost in quality: windows, tasks, published suites."""
