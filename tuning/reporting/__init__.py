"""The report of a search: tables, plots and one HTML file."""
