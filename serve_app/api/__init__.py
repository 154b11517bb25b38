"""HTTP: routes, access, metrics, status page."""
