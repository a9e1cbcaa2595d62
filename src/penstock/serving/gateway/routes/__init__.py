"""One module per group of routes; each offers `add_routes(app, gateway)`."""
